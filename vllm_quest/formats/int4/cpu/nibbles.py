"""4-bit codes in the CPU kernels, two per byte, as numba intrinsics, and whose the residuals of a block are.

The first three work on bytes in float32, whole numbers that it holds exactly; the other intrinsics unpack
integers in registers on the way into a matrix product.
"""

from __future__ import annotations

from numba import njit, types
from numba.extending import intrinsic

from vllm_quest.formats.int4 import reference
from vllm_quest.kernels.cpu.elements import (
    F32,
    I32,
    STORED_AS,
    Pointer,
    Tile,
    constant,
    ir,
    join,
    splat_vector,
    split,
    write,
)
from vllm_quest.kernels.cpu.memory import get
from vllm_quest.kernels.cpu.simd import add_outer, call

BYTE = STORED_AS["uint8"]
TAGS = reference.TAGS


@njit(error_model="numpy")
def has_residual(key_residual, half, page):
    """Whether the residuals of K and V in a block are those of its page `page`; K's is ``[D, S / 2]``."""
    return int(get(key_residual, half - 1)) // TAGS == page % TAGS


def high_half(builder, x):
    return call(builder, "floor", x.type, [builder.fmul(x, x.type([1 / 16] * x.type.count))])


@intrinsic
def high_nibbles(typingctx, tile):
    """The high halves of bytes."""
    return tile(tile), lambda context, builder, sig, args: join(
        builder, [high_half(builder, x) for x in split(builder, args[0])]
    )


@intrinsic
def low_nibbles(typingctx, tile):
    """The low halves of bytes."""
    sixteen = ir.VectorType(F32, tile.lanes)([16.0] * tile.lanes)
    return tile(tile), lambda context, builder, sig, args: join(
        builder,
        [builder.fsub(x, builder.fmul(high_half(builder, x), sixteen)) for x in split(builder, args[0])],
    )


@intrinsic
def packed(typingctx, low, high):
    """Bytes of two tiles of 4-bit codes."""
    sixteen = ir.VectorType(F32, low.lanes)([16.0] * low.lanes)
    return low(low, low), lambda context, builder, sig, args: join(
        builder,
        [
            builder.fadd(x, builder.fmul(y, sixteen))
            for x, y in zip(split(builder, args[0]), split(builder, args[1]), strict=True)
        ],
    )


def unpack(builder, address, count: int) -> tuple:
    """The low and the high halves of `count` bytes at an address, as bytes."""
    vector = ir.VectorType(BYTE, count)
    both = builder.load(builder.bitcast(address, vector.as_pointer()), align=1)
    return builder.and_(both, vector([15] * count)), builder.lshr(both, vector([4] * count))


def to_float(builder, codes):
    lanes = codes.type.count
    return builder.sitofp(builder.zext(codes, ir.VectorType(I32, lanes)), ir.VectorType(F32, lanes))


@intrinsic
def multiply_add_keys(typingctx, tile, column, column_stride, codes):
    """``tile[i, j] + column[i * column_stride] * codes[j]`` for one channel of K.

    Vector j of the codes comes from the j-th ``lanes / 2`` bytes: their low halves, then their high ones.
    """
    half = tile.lanes // 2

    def codegen(context, builder, sig, args):
        both = ir.Constant(ir.VectorType(I32, tile.lanes), list(range(tile.lanes)))
        row = [
            to_float(builder, builder.shuffle_vector(*unpack(builder, address, half), both))
            for address in (builder.gep(args[3], [I32(col * half)]) for col in range(tile.cols))
        ]
        vectors = split(builder, args[0])
        add_outer(builder, vectors, tile, args[1], args[2], row)
        return join(builder, vectors)

    return tile(tile, Pointer("float32"), types.int64, Pointer("uint8")), codegen


@intrinsic
def multiply_add_values(typingctx, tile, column, column_stride, partner, codes):
    """Adds two tokens of V, those of the low and the high halves of ``cols * lanes`` bytes.

    Their weights lie at `column` and, `partner` elements on, for the token of the high halves.
    """

    def codegen(context, builder, sig, args):
        halves = [
            unpack(builder, builder.gep(args[4], [I32(c * tile.lanes)]), tile.lanes) for c in range(tile.cols)
        ]
        vectors = split(builder, args[0])
        for column, half in ((args[1], 0), (builder.gep(args[1], [args[3]]), 1)):
            row = [to_float(builder, codes[half]) for codes in halves]
            add_outer(builder, vectors, tile, column, args[2], row)
        return join(builder, vectors)

    return tile(tile, Pointer("float32"), types.int64, types.int64, Pointer("uint8")), codegen


@intrinsic
def splat_rows(typingctx, ptr, rows, cols, lanes):
    """A tile whose row i holds the i-th float32 at `ptr` everywhere."""
    result = Tile(constant(rows), constant(cols), constant(lanes))

    def codegen(context, builder, sig, args):
        scalars = [builder.load(builder.gep(args[0], [I32(i)])) for i in range(result.rows)]
        return join(
            builder, [splat_vector(builder, x, result.lanes) for x in scalars for _ in range(result.cols)]
        )

    return result(Pointer("float32"), rows, cols, lanes), codegen


@intrinsic
def store_halves(typingctx, ptr, row_stride, partner, tile):
    """Writes the lower half of every vector's lanes to `ptr`, the upper half `partner` elements on."""
    half = tile.lanes // 2
    halves = [ir.Constant(ir.VectorType(I32, half), list(range(start, start + half))) for start in (0, half)]

    def codegen(context, builder, sig, args):
        for i, vector in enumerate(split(builder, args[3])):
            row, col = divmod(i, tile.cols)
            place = builder.add(builder.mul(args[1], args[1].type(row)), args[1].type(col * half))
            for mask, offset in zip(halves, (place, builder.add(place, args[2])), strict=True):
                part = builder.shuffle_vector(vector, vector, mask)
                write(builder, part, builder.gep(args[0], [offset]), ptr.dtype)
        return context.get_dummy_value()

    return types.void(Pointer("float32"), types.int64, types.int64, tile), codegen


@intrinsic
def load_words(typingctx, ptr, stride, high, like):
    """The low or the high bfloat16 of 32-bit words `stride` words apart; `ptr` points at bfloat16."""
    result = Tile(1, 1, like.lanes)
    take_high = constant(high)

    def codegen(context, builder, sig, args):
        words = builder.bitcast(args[0], I32.as_pointer())
        vector = ir.Constant(ir.VectorType(I32, result.lanes), ir.Undefined)
        for i in range(result.lanes):
            word = builder.load(builder.gep(words, [builder.mul(args[1], args[1].type(i))]), align=4)
            vector = builder.insert_element(vector, word, I32(i))
        if take_high:
            bits = builder.and_(vector, vector.type([0xFFFF0000] * result.lanes))
        else:
            bits = builder.shl(vector, vector.type([16] * result.lanes))
        return join(builder, [builder.bitcast(bits, ir.VectorType(F32, result.lanes))])

    return result(Pointer("bfloat16"), types.int64, high, like), codegen
