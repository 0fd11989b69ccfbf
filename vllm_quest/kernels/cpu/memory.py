"""Pointers and memory for the CPU kernels, as numba intrinsics: loads, stores, stack memory, atomic counters.

Sizes (`lanes`, `rows`, `cols`) and dtype names are compile-time constants.
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from vllm_quest.kernels.cpu.elements import (
    I32,
    SIZE,
    STORED_AS,
    Pointer,
    Tile,
    addresses,
    constant,
    join,
    read,
    splat_vector,
    split,
    write,
)

PREFETCH_INTO_L2 = 2


@intrinsic
def pointer(typingctx, address, dtype):
    """The int64 `address` as a pointer to `dtype`."""
    result = Pointer(constant(dtype))
    return result(types.int64, dtype), lambda context, builder, sig, args: builder.inttoptr(
        args[0], STORED_AS[result.dtype].as_pointer()
    )


@intrinsic
def stack(typingctx, dtype, elements):
    """Uninitialized stack memory; one piece per call site, also inside a loop."""
    result = Pointer(constant(dtype))
    count = constant(elements)

    def codegen(context, builder, sig, args):
        memory = cgutils.alloca_once(builder, ir.ArrayType(STORED_AS[result.dtype], count))
        memory.align = 64
        return builder.bitcast(memory, STORED_AS[result.dtype].as_pointer())

    return result(dtype, elements), codegen


@intrinsic
def advance(typingctx, ptr, elements):
    """The pointer `elements` further on."""
    return ptr(ptr, types.int64), lambda context, builder, sig, args: builder.gep(args[0], [args[1]])


@intrinsic
def get(typingctx, ptr, index):
    """One element: float32 if it is a floating-point number, int64 otherwise."""
    is_integer = ptr.dtype.startswith("int")

    def codegen(context, builder, sig, args):
        address = builder.gep(args[0], [args[1]])
        if is_integer:
            value = builder.load(address)
            return builder.sext(value, ir.IntType(64)) if value.type.width < 64 else value
        return builder.extract_element(read(builder, address, ptr.dtype, 1), I32(0))

    return (types.int64 if is_integer else types.float32)(ptr, types.int64), codegen


@intrinsic
def put(typingctx, ptr, index, value):
    """Writes one float32, rounded to the pointer's dtype, or one integer."""
    is_integer = ptr.dtype.startswith("int")

    def codegen(context, builder, sig, args):
        address = builder.gep(args[0], [args[1]])
        if is_integer:
            builder.store(builder.trunc(args[2], address.type.pointee), address)
        else:
            write(builder, splat_vector(builder, args[2], 1), address, ptr.dtype)
        return context.get_dummy_value()

    return types.void(ptr, types.int64, types.int64 if is_integer else types.float32), codegen


@intrinsic
def load(typingctx, ptr, lanes):
    """`lanes` consecutive elements as one vector."""
    result = Tile(1, 1, constant(lanes))
    return result(ptr, lanes), lambda context, builder, sig, args: join(
        builder, [read(builder, args[0], ptr.dtype, result.lanes)]
    )


@intrinsic
def load_like(typingctx, ptr, tile):
    """As many consecutive elements as a vector of `tile` has."""
    result = Tile(1, 1, tile.lanes)
    return result(ptr, tile), lambda context, builder, sig, args: join(
        builder, [read(builder, args[0], ptr.dtype, result.lanes)]
    )


@intrinsic
def load_tile(typingctx, ptr, row_stride, rows, cols, lanes):
    """A tile whose rows of ``cols * lanes`` elements are `row_stride` elements apart."""
    result = Tile(constant(rows), constant(cols), constant(lanes))

    def codegen(context, builder, sig, args):
        return join(
            builder,
            [
                read(builder, address, ptr.dtype, result.lanes)
                for address in addresses(builder, args[0], args[1], result)
            ],
        )

    return result(ptr, types.int64, rows, cols, lanes), codegen


@intrinsic
def store(typingctx, ptr, row_stride, tile):
    """Writes a tile, rounded to the pointer's dtype; rows are `row_stride` elements apart."""

    def codegen(context, builder, sig, args):
        where = addresses(builder, args[0], args[1], tile)
        for address, vector in zip(where, split(builder, args[2]), strict=True):
            write(builder, vector, address, ptr.dtype)
        return context.get_dummy_value()

    return types.void(ptr, types.int64, tile), codegen


@intrinsic
def copy(typingctx, source, target, lanes):
    """Copies `lanes` consecutive elements, bit by bit."""
    count = constant(lanes)

    def codegen(context, builder, sig, args):
        vector = ir.VectorType(STORED_AS[source.dtype], count).as_pointer()
        values = builder.load(builder.bitcast(args[0], vector), align=SIZE[source.dtype])
        builder.store(values, builder.bitcast(args[1], vector), align=SIZE[source.dtype])
        return context.get_dummy_value()

    return types.void(source, source, lanes), codegen


@intrinsic
def scatter(typingctx, source, target, stride, lanes):
    """Copies `lanes` consecutive elements, bit by bit, to places `stride` elements apart."""
    count = constant(lanes)

    def codegen(context, builder, sig, args):
        vector = ir.VectorType(STORED_AS[source.dtype], count)
        values = builder.load(builder.bitcast(args[0], vector.as_pointer()), align=SIZE[source.dtype])
        for i in range(count):
            address = builder.gep(args[1], [builder.mul(args[2], args[2].type(i))])
            builder.store(builder.extract_element(values, I32(i)), address)
        return context.get_dummy_value()

    return types.void(source, source, types.int64, lanes), codegen


@intrinsic
def prefetch(typingctx, ptr):
    """Starts to read a cache line that is needed soon; never faults."""

    def codegen(context, builder, sig, args):
        byte = ir.IntType(8).as_pointer()
        signature = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
        function = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
        builder.call(function, [builder.bitcast(args[0], byte), I32(0), I32(PREFETCH_INTO_L2), I32(1)])
        return context.get_dummy_value()

    return types.void(ptr), codegen


@intrinsic
def next_item(typingctx, counter):
    """Returns the counter's value and adds one, atomically; orders memory like taking and giving a lock."""
    return types.int64(counter), lambda context, builder, sig, args: builder.atomic_rmw(
        "add", args[0], args[0].type.pointee(1), "acq_rel"
    )


@njit(error_model="numpy")
def page_start(base, block_stride, table, page, pages_per_block, page_stride):
    """Where a page lies that a row's block table leads to.

    `base` points at one KV head's part of block 0; the pages of a block are `page_stride` elements apart.
    """
    return advance(
        base, get(table, page // pages_per_block) * block_stride + page % pages_per_block * page_stride
    )
