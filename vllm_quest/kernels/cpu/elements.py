"""Two numba types, pointers to elements of a dtype and tiles of float32 vectors, and LLVM code for them.

Numba has neither bfloat16 nor vectors. Every load converts to float32 and every store back, so that a kernel
is one text for every dtype.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core.errors import TypingError
from numba.extending import models, register_model

F32, I32 = ir.FloatType(), ir.IntType(32)
# bfloat16 travels as its bits: LLVM's own type would round through library calls on older CPUs.
STORED_AS = {
    "float32": F32,
    "float16": ir.HalfType(),
    "bfloat16": ir.IntType(16),
    "uint8": ir.IntType(8),
    "int32": I32,
    "int64": ir.IntType(64),
}
SIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1, "int32": 4, "int64": 8}


class Pointer(types.Type):
    """Address of elements of one dtype, a key of `STORED_AS`."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        super().__init__(name=f"Pointer({dtype})")


class Tile(types.Type):
    """``[rows, cols]`` vectors of `lanes` float32 in registers; a single vector is ``[1, 1]``."""

    def __init__(self, rows: int, cols: int, lanes: int) -> None:
        self.rows, self.cols, self.lanes = rows, cols, lanes
        super().__init__(name=f"Tile({rows}, {cols}, {lanes})")


@register_model(Pointer)
class PointerModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type) -> None:
        super().__init__(dmm, fe_type, STORED_AS[fe_type.dtype].as_pointer())


@register_model(Tile)
class TileModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type) -> None:
        vector = ir.VectorType(F32, fe_type.lanes)
        super().__init__(dmm, fe_type, ir.ArrayType(vector, fe_type.rows * fe_type.cols))


def splat_vector(builder, scalar, lanes: int):
    """The scalar in every lane."""
    empty = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    single = builder.insert_element(empty, scalar, I32(0))
    return builder.shuffle_vector(single, empty, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def read(builder, address, dtype: str, lanes: int):
    """Loads `lanes` consecutive elements as float32; assumes no alignment beyond an element's."""
    stored = ir.VectorType(STORED_AS[dtype], lanes)
    bits = builder.load(builder.bitcast(address, stored.as_pointer()), align=SIZE[dtype])
    if dtype == "float32":
        return bits
    if dtype == "float16":
        return builder.fpext(bits, ir.VectorType(F32, lanes))
    wide = ir.VectorType(I32, lanes)
    if dtype == "uint8":
        return builder.sitofp(builder.zext(bits, wide), ir.VectorType(F32, lanes))
    return builder.bitcast(
        builder.shl(builder.zext(bits, wide), wide([16] * lanes)), ir.VectorType(F32, lanes)
    )


def write(builder, vector, address, dtype: str) -> None:
    """Stores float32 values as `dtype`, rounded to nearest even; uint8 takes whole numbers, 0 to 255."""
    lanes = vector.type.count
    if dtype == "uint8":
        whole = builder.fptosi(vector, ir.VectorType(I32, lanes))
        vector = builder.trunc(whole, ir.VectorType(STORED_AS[dtype], lanes))
    elif dtype == "float16":
        vector = builder.fptrunc(vector, ir.VectorType(STORED_AS[dtype], lanes))
    elif dtype == "bfloat16":
        wide = ir.VectorType(I32, lanes)
        bits = builder.bitcast(vector, wide)
        odd = builder.and_(builder.lshr(bits, wide([16] * lanes)), wide([1] * lanes))
        rounded = builder.add(bits, builder.add(odd, wide([0x7FFF] * lanes)))
        # The addition could turn a NaN into a number.
        is_nan = builder.fcmp_unordered("uno", vector, vector)
        bits = builder.select(is_nan, wide([0x7FC00000] * lanes), rounded)
        vector = builder.trunc(builder.lshr(bits, wide([16] * lanes)), ir.VectorType(STORED_AS[dtype], lanes))
    builder.store(vector, builder.bitcast(address, vector.type.as_pointer()), align=SIZE[dtype])


def constant(value: types.Type) -> Any:
    if not isinstance(value, types.Literal):
        raise TypingError(f"expected a compile-time constant, got {value}")
    return value.literal_value


def split(builder, tile) -> list:
    return [builder.extract_value(tile, i) for i in range(tile.type.count)]


def join(builder, vectors: list):
    tile = ir.Constant(ir.ArrayType(vectors[0].type, len(vectors)), ir.Undefined)
    for i, vector in enumerate(vectors):
        tile = builder.insert_value(tile, vector, i)
    return tile


def addresses(builder, start, row_stride, tile: Tile) -> list:
    found = []
    for row in range(tile.rows):
        row_start = builder.gep(start, [builder.mul(row_stride, row_stride.type(row))])
        found += [builder.gep(row_start, [I32(col * tile.lanes)]) for col in range(tile.cols)]
    return found
