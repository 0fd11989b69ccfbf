"""Instructions that compute a register from others, thread by thread."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from tools.ptx.machine import HALVES, Machine, as_bits, dtype_of
from tools.ptx.parse import Instruction

__all__ = ["ARITHMETIC"]

_ROUNDINGS = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def _wide(a: np.ndarray) -> np.ndarray:
    return a.astype(f"{a.dtype.kind}{2 * a.itemsize}")


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Towards zero; what a division by zero yields is up to the GPU."""
    if a.dtype.kind == "f":
        return a / b
    quotient = np.abs(a) // np.abs(np.where(b == 0, 1, b))
    return (np.where((a < 0) != (b < 0), -quotient, quotient)).astype(a.dtype)


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The product of two float32 is exact in float64; the sum is rounded there once more."""
    return (a.astype(np.float64) * b + c).astype(a.dtype)


def _shift_left(a: np.ndarray, count: np.ndarray) -> np.ndarray:
    bits = 8 * a.itemsize
    return np.where(count < bits, a << np.minimum(count, bits - 1).astype(a.dtype), 0).astype(a.dtype)


def _shift_right(a: np.ndarray, count: np.ndarray) -> np.ndarray:
    """A signed number fills with its sign, and so does a shift by more bits than there are."""
    bits = 8 * a.itemsize
    shifted = a >> np.minimum(count, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(count < bits, shifted, 0).astype(a.dtype)


def _extract(a: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """A field of bits (`bfe`) of a 32-bit number, which does not reach beyond it."""
    left = np.uint8(32) - (start + length).astype(np.uint8)
    return _shift_right(_shift_left(a, left), np.uint8(32) - length.astype(np.uint8))


def _funnel(low: np.ndarray, high: np.ndarray, count: np.ndarray, left: bool) -> np.ndarray:
    """The upper word of both shifted to the left, or the lower of both shifted to the right."""
    both = low.astype(np.uint64) | high.astype(np.uint64) << 32
    count = (count & 31).astype(np.uint64)
    return ((both << count) >> 32 if left else both >> count).astype(np.uint32)


def _permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Bytes of both words by the selector's digits (`prmt`), whose highest bit spreads the byte's sign."""
    source = np.stack([a, b], 1).view(np.uint8)
    digits = selector[:, None] >> np.array([0, 4, 8, 12], np.uint32) & 15
    found = np.take_along_axis(source, (digits & 7).astype(np.int64), 1)
    signs = np.where(found & 128, 255, 0)
    return np.where(digits & 8, signs, found).astype(np.uint8).view(np.uint32)[:, 0]


def _bitwise(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Any function of three bits (`lop3`): the table's bits are its values for abc = 000, 001, ..."""
    found = np.zeros_like(a)
    for index in range(8):
        bits = [x if index & place else ~x for x, place in ((a, 4), (b, 2), (c, 1))]
        found |= np.where(table >> np.uint32(index) & 1, bits[0] & bits[1] & bits[2], 0).astype(a.dtype)
    return found


# Functions of an instruction's operands
FUNCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mul.lo": np.multiply,
    "mul.wide": lambda a, b: _wide(a) * _wide(b),
    "mad.lo": lambda a, b, c: a * b + c,
    "mad.wide": lambda a, b, c: _wide(a) * _wide(b) + c,
    "fma": _fma,
    "div": _divide,
    "rem": lambda a, b: a - _divide(a, b) * b,
    "min": np.fmin,  # a number, where there is one
    "max": np.fmax,
    "neg": np.negative,
    "abs": np.abs,
    "rcp": np.reciprocal,
    "ex2": np.exp2,
    "lg2": np.log2,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "lop3": _bitwise,
    "shl": _shift_left,
    "shr": _shift_right,
    "shf.l.wrap": partial(_funnel, left=True),
    "shf.r.wrap": partial(_funnel, left=False),
    "bfe": _extract,
    "prmt": _permute,
    "selp": lambda a, b, chosen: np.where(chosen, a, b),
    "setp.lt": np.less,
    "setp.le": np.less_equal,
    "setp.gt": np.greater,
    "setp.ge": np.greater_equal,
    "setp.eq": np.equal,
    "setp.ne": np.not_equal,
}
# By operand, where it is not of the instruction's type, or (`wide`) twice as wide
SOURCES = {
    "shl": ("", "u32"),
    "shr": ("", "u32"),
    "bfe": ("", "u32", "u32"),
    "lop3": ("", "", "", "u32"),
    "mad.wide": ("", "", "wide"),
    "selp": ("", "", "pred"),
}


def _compute(machine: Machine, instruction: Instruction) -> None:
    """One of FUNCTIONS; in 16 bits it computes in float32 and rounds once."""
    result, *operands = instruction.operands
    kind = instruction.types[-1]
    kinds = {"": kind, "wide": f"{kind[0]}64"}
    sources = SOURCES.get(instruction.name, ("",) * len(operands))
    values = [
        machine.read(operand, kinds.get(source, source))
        for operand, source in zip(operands, sources, strict=True)
    ]
    computed = FUNCTIONS[instruction.name](*values)
    is_half = kind in HALVES and computed.dtype.kind == "f"
    machine.write(result, as_bits(computed, kind) if is_half else computed)


def _convert(machine: Machine, instruction: Instruction) -> None:
    """`cvt`, by the types to and from; whole numbers are limited to the range of their type."""
    result, *operands = instruction.operands
    to, source = instruction.types
    values = [machine.read(operand, source) for operand in operands]
    rounding = instruction.name.partition(".")[2]
    if rounding:
        values = [_ROUNDINGS[rounding](value) for value in values]
    value = values[0]
    if to in ("f16x2", "bf16x2"):
        high, low = values
        value = as_bits(np.stack([low, high], 1), to)
    elif to in ("f16", "bf16"):
        value = as_bits(value.astype(np.float32), to)
    elif value.dtype.kind == "f" and to[0] != "f":
        limits = np.iinfo(dtype_of(to))
        value = np.clip(np.nan_to_num(value.astype(np.float64)), limits.min, limits.max).astype(dtype_of(to))
    else:
        value = value.astype(dtype_of(to))
    machine.write(result, value)


def _move(machine: Machine, instruction: Instruction) -> None:
    """`mov`; also a register into a vector of its parts, and back."""
    result, source = instruction.operands
    kind = instruction.types[0]
    if isinstance(source, tuple):
        part = f"b{int(kind[1:]) // len(source)}"
        parts = np.stack([machine.read(register, part) for register in source], 1)
        machine.write(result, parts.view(dtype_of(kind))[:, 0])
    elif isinstance(result, tuple):
        part = f"b{int(kind[1:]) // len(result)}"
        parts = machine.read(source, kind).view(dtype_of(part)).reshape(machine.threads, len(result))
        for register, values in zip(result, parts.T, strict=True):
            machine.write(register, values)
    else:
        machine.write(result, machine.read(source, kind))


ARITHMETIC: dict[str, Callable[[Machine, Instruction], None]] = {
    **dict.fromkeys(FUNCTIONS, _compute),
    **dict.fromkeys(["cvt", *(f"cvt.{rounding}" for rounding in _ROUNDINGS)], _convert),
    "mov": _move,
}
