"""The vector arithmetic that the CPU kernels are written in, as numba intrinsics.

Every function takes and returns tiles of float32 in registers (`elements.Tile`). Sizes are compile-time
constants and loops over them are unrolled here: nothing is left to the vectorizer's judgement.
"""

from __future__ import annotations

import math

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from vllm_quest.kernels.cpu.elements import (
    F32,
    I32,
    Pointer,
    Tile,
    addresses,
    constant,
    join,
    read,
    splat_vector,
    split,
)

REASSOCIATE = ("reassoc", "contract", "nsz")


def call(builder, name: str, result, args, flags=()):
    """Calls the LLVM intrinsic `name`, overloaded on its last argument's vector type."""
    signature = ir.FunctionType(result, [arg.type for arg in args])
    function = cgutils.get_or_insert_function(
        builder.module, signature, f"llvm.{name}.v{args[-1].type.count}f32"
    )
    return builder.call(function, args, fastmath=flags)


@intrinsic
def filled(typingctx, value, rows, cols, lanes):
    """A tile with the value everywhere."""
    result = Tile(constant(rows), constant(cols), constant(lanes))
    return result(types.float32, rows, cols, lanes), lambda context, builder, sig, args: join(
        builder, [splat_vector(builder, args[0], result.lanes)] * (result.rows * result.cols)
    )


@intrinsic
def zeros(typingctx, rows, cols, lanes):
    """A tile of zeros."""
    result = Tile(constant(rows), constant(cols), constant(lanes))
    return result(rows, cols, lanes), lambda context, builder, sig, args: ir.Constant(
        context.get_value_type(result), None
    )


@intrinsic
def splat(typingctx, value, lanes):
    """The value in every lane of one vector."""
    result = Tile(1, 1, constant(lanes))
    return result(types.float32, lanes), lambda context, builder, sig, args: join(
        builder, [splat_vector(builder, args[0], result.lanes)]
    )


@intrinsic
def splat_like(typingctx, value, tile):
    """The value in every lane of a vector as long as those of `tile`."""
    result = Tile(1, 1, tile.lanes)
    return result(types.float32, tile), lambda context, builder, sig, args: join(
        builder, [splat_vector(builder, args[0], result.lanes)]
    )


def elementwise(combine):
    """An intrinsic that applies `combine(builder, a, b)` to each pair of vectors of two tiles."""

    def typed(typingctx, a, b):
        def codegen(context, builder, sig, args):
            pairs = zip(split(builder, args[0]), split(builder, args[1]), strict=True)
            return join(builder, [combine(builder, left, right) for left, right in pairs])

        return a(a, a), codegen

    return intrinsic(typed)


add = elementwise(lambda builder, a, b: builder.fadd(a, b))
subtract = elementwise(lambda builder, a, b: builder.fsub(a, b))
multiply = elementwise(lambda builder, a, b: builder.fmul(a, b))
maximum = elementwise(lambda builder, a, b: call(builder, "maxnum", a.type, [a, b], ("nsz",)))
minimum = elementwise(lambda builder, a, b: call(builder, "minnum", a.type, [a, b], ("nsz",)))


def add_outer(builder, vectors: list, tile: Tile, column, column_stride, row: list) -> None:
    """Adds ``column[i * column_stride] * row[j]`` to ``vectors[i, j]`` in place."""
    for i in range(tile.rows):
        scalar = builder.load(builder.gep(column, [builder.mul(column_stride, column_stride.type(i))]))
        left = splat_vector(builder, scalar, tile.lanes)
        for j in range(tile.cols):
            at = i * tile.cols + j
            vectors[at] = call(builder, "fma", left.type, [left, row[j], vectors[at]])


@intrinsic
def multiply_add_outer(typingctx, tile, column, column_stride, row):
    """``tile[i, j] + column[i * column_stride] * row[j]``: one step of a matrix product.

    `column` points at float32 scalars, `row` at ``cols * lanes`` consecutive elements of any dtype.
    """

    def codegen(context, builder, sig, args):
        vectors = split(builder, args[0])
        single_row = Tile(1, tile.cols, tile.lanes)
        right = [
            read(builder, address, row.dtype, tile.lanes)
            for address in addresses(builder, args[3], args[2], single_row)
        ]
        add_outer(builder, vectors, tile, args[1], args[2], right)
        return join(builder, vectors)

    return tile(tile, Pointer("float32"), types.int64, row), codegen


@intrinsic
def multiply_add_rows(typingctx, tile, rows, row_stride, vector):
    """``tile[i] + rows[i] * vector``, lane by lane, for a tile of one column; `rows` points at float32."""

    def codegen(context, builder, sig, args):
        (right,) = split(builder, args[3])
        vectors = [
            call(builder, "fma", right.type, [read(builder, address, "float32", tile.lanes), right, old])
            for address, old in zip(
                addresses(builder, args[1], args[2], tile), split(builder, args[0]), strict=True
            )
        ]
        return join(builder, vectors)

    return tile(tile, Pointer("float32"), types.int64, vector), codegen


@intrinsic
def max_lane(typingctx, vector):
    """The largest lane of one vector, float32."""
    return types.float32(vector), lambda context, builder, sig, args: call(
        builder, "vector.reduce.fmax", F32, split(builder, args[0]), ("nsz",)
    )


def over_rows(name: str):
    """An intrinsic that reduces each row of a tile of `lanes` rows, 1 column, to one lane of a vector."""

    def typed(typingctx, tile):
        even = ir.Constant(ir.VectorType(I32, tile.lanes), list(range(0, 2 * tile.lanes, 2)))
        odd = ir.Constant(ir.VectorType(I32, tile.lanes), list(range(1, 2 * tile.lanes, 2)))

        def codegen(context, builder, sig, args):
            vectors = split(builder, args[0])
            # Neighbouring lanes of two vectors become one vector, until one lane of each row is left.
            while len(vectors) > 1:
                pairs = zip(vectors[::2], vectors[1::2], strict=True)
                vectors = [
                    call(
                        builder,
                        name,
                        a.type,
                        [builder.shuffle_vector(a, b, mask) for mask in (even, odd)],
                        ("nsz",),
                    )
                    for a, b in pairs
                ]
            return join(builder, vectors)

        return Tile(1, 1, tile.lanes)(tile), codegen

    return intrinsic(typed)


min_of_rows = over_rows("minnum")
max_of_rows = over_rows("maxnum")


@intrinsic
def sum_tile(typingctx, tile):
    """The sum of everything in a tile, float32."""

    def codegen(context, builder, sig, args):
        first, *rest = split(builder, args[0])
        for vector in rest:
            first = builder.fadd(first, vector)
        return call(builder, "vector.reduce.fadd", F32, [F32(-0.0), first], REASSOCIATE)

    return types.float32(tile), codegen


@intrinsic
def put_row_sums(typingctx, ptr, tile):
    """Writes the sum of each row of a tile of one column to consecutive float32."""

    def codegen(context, builder, sig, args):
        for i, vector in enumerate(split(builder, args[1])):
            total = call(builder, "vector.reduce.fadd", F32, [F32(-0.0), vector], REASSOCIATE)
            builder.store(total, builder.gep(args[0], [I32(i)]))
        return context.get_dummy_value()

    return types.void(Pointer("float32"), tile), codegen


@intrinsic
def at_least(typingctx, tile, threshold):
    """1 in the lanes that reach the threshold, 0 in the others."""

    def codegen(context, builder, sig, args):
        limit = splat_vector(builder, args[1], tile.lanes)
        one, zero = limit.type([1.0] * tile.lanes), limit.type([0.0] * tile.lanes)
        return join(
            builder,
            [
                builder.select(builder.fcmp_ordered(">=", vector, limit), one, zero)
                for vector in split(builder, args[0])
            ],
        )

    return tile(tile, types.float32), codegen


@intrinsic
def float_of_bits(typingctx, bits):
    """The float32 with these 32 bits."""
    return types.float32(types.int64), lambda context, builder, sig, args: builder.bitcast(
        builder.trunc(args[0], I32), F32
    )


@intrinsic
def first_lanes(typingctx, tile, count, other):
    """The first `count` lanes of every vector, and `other` in the lanes after them."""

    def codegen(context, builder, sig, args):
        index = ir.Constant(ir.VectorType(I32, tile.lanes), list(range(tile.lanes)))
        limit = splat_vector(builder, builder.trunc(args[1], I32), tile.lanes)
        kept, rest = builder.icmp_signed("<", index, limit), splat_vector(builder, args[2], tile.lanes)
        return join(builder, [builder.select(kept, vector, rest) for vector in split(builder, args[0])])

    return tile(tile, types.int64, types.float32), codegen


@intrinsic
def exp2(typingctx, vector):
    """2 ** x for x <= 0 to float32 rounding; exactly 0 below -126.5, -inf included."""

    def codegen(context, builder, sig, args):
        (x,) = split(builder, args[0])
        lanes = vector.lanes
        wide = ir.VectorType(I32, lanes)
        x = call(builder, "maxnum", x.type, [x, x.type([-127.0] * lanes)])
        whole = call(builder, "nearbyint", x.type, [x])
        part = builder.fsub(x, whole)
        # Taylor's series of 2 ** part; |part| <= 1/2, so the eighth term is below float32's rounding.
        power = x.type([math.log(2) ** 7 / math.factorial(7)] * lanes)
        for n in range(6, -1, -1):
            power = call(
                builder, "fma", x.type, [power, part, x.type([math.log(2) ** n / math.factorial(n)] * lanes)]
            )
        exponent = builder.add(builder.fptosi(whole, wide), wide([127] * lanes))
        factor = builder.bitcast(builder.shl(exponent, wide([23] * lanes)), x.type)
        return join(builder, [builder.fmul(power, factor)])

    return vector(vector), codegen
