"""Instructions of whole warps: exchanges between threads, and the tensor cores."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tools.ptx.machine import WARP, Machine, PtxError
from tools.ptx.parse import Instruction

__all__ = ["WARPS"]

_LANE = np.arange(WARP)
# Lanes hold the elements of an 8 x 8 matrix in fours: `_GROUP` is the row, `_PAIR` two columns.
_GROUP, _PAIR = _LANE // 4, 2 * (_LANE % 4)
_HALF = np.arange(2)


def _expect_all(machine: Machine, members: str | int) -> None:
    """That every lane of a warp takes part."""
    if not machine.active.all() or (machine.read(members, "s32") != -1).any():
        raise PtxError("by some lanes of a warp")


def _shuffle(machine: Machine, instruction: Instruction) -> None:
    """`shfl`, from a lane whose number differs in bits (`bfly`), from one below (`up`) or any one (`idx`)."""
    result, source, operand, clamp, members = instruction.operands
    _expect_all(machine, members)
    way = instruction.name.rpartition(".")[2]
    if clamp != (0 if way == "up" else WARP - 1):
        raise PtxError("between parts of a warp")
    lane = np.arange(machine.threads) % WARP
    given = machine.read(operand, "u32").astype(np.int64)
    # Where no lane is below, threads keep their own.
    other = {"bfly": lane ^ given, "up": np.where(given > lane, lane, lane - given), "idx": given % WARP}[way]
    values = machine.read(source, instruction.types[0])
    machine.write(result, np.take_along_axis(values.reshape(-1, WARP), other.reshape(-1, WARP), 1).ravel())


def _reduce(machine: Machine, instruction: Instruction) -> None:
    """`redux`: one number of all lanes."""
    result, source, members = instruction.operands
    _expect_all(machine, members)
    function = {"min": np.minimum, "max": np.maximum, "add": np.add}[instruction.name.split(".")[-1]]
    values = machine.read(source, instruction.types[0])
    reduced = function.reduce(values.reshape(-1, WARP), 1).astype(values.dtype)
    machine.write(result, np.repeat(reduced, WARP))


def _rows(machine: Machine, address, matrix: int) -> np.ndarray:
    """``[warps * 8]`` addresses of a matrix' rows: eight lanes of each warp have them."""
    return machine.address(address).reshape(-1, WARP)[:, 8 * matrix : 8 * matrix + 8].reshape(-1)


def _load_matrices(machine: Machine, instruction: Instruction) -> None:
    """`ldmatrix`: 8 x 8 halves per register; each lane gets two of a row, or (`trans`) of a column."""
    results, address = instruction.operands
    for matrix, register in enumerate(results):
        rows = _rows(machine, address, matrix)
        found = machine.shared.load(rows, 16, np.ones(len(rows), bool)).view(np.uint16).reshape(-1, 8, 8)
        if ".trans" in instruction.name:
            found = found.swapaxes(1, 2)
        machine.write(register, np.ascontiguousarray(found).view(np.uint32).reshape(-1))


def _store_matrices(machine: Machine, instruction: Instruction) -> None:
    """`stmatrix`, the same way back."""
    address, sources = instruction.operands
    for matrix, register in enumerate(sources):
        values = machine.read(register, "b32").reshape(-1, 8, 4).view(np.uint16)
        if ".trans" in instruction.name:
            values = values.swapaxes(1, 2)
        rows = _rows(machine, address, matrix)
        stored = np.ascontiguousarray(values).view(np.uint8).reshape(-1, 16)
        machine.shared.store(rows, stored, np.ones(len(rows), bool))


def _multiply(machine: Machine, instruction: Instruction) -> None:
    """`mma` of ``[16, 16]`` by ``[16, 8]``: which lane holds what is in the PTX manual under m16n8k16."""
    results, left, right, added = instruction.operands
    _, left_kind, right_kind, _ = instruction.types
    warps = machine.threads // WARP
    halves = (warps, WARP, 2)
    a, b, c = (np.zeros((warps, *shape), np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
    for index, register in enumerate(left):
        row, column = (_GROUP + 8 * (index % 2))[:, None], _PAIR + 8 * (index // 2)
        a[:, row, column[:, None] + _HALF] = machine.read(register, f"{left_kind}x2").reshape(halves)
    for index, register in enumerate(right):
        row = (_PAIR + 8 * index)[:, None] + _HALF
        b[:, row, _GROUP[:, None]] = machine.read(register, f"{right_kind}x2").reshape(halves)
    places = [(_GROUP + 8 * (index // 2), _PAIR + index % 2) for index in range(4)]
    for (row, column), register in zip(places, added, strict=True):
        c[:, row, column] = machine.read(register, "f32").reshape(warps, WARP)
    product = a @ b + c
    for (row, column), register in zip(places, results, strict=True):
        machine.write(register, product[:, row, column].reshape(-1))


_MATRICES = [f"m8n8.{count}{way}.shared" for count in ("x1", "x2", "x4") for way in ("", ".trans")]
WARPS: dict[str, Callable[[Machine, Instruction], None]] = {
    **dict.fromkeys(("shfl.sync.bfly", "shfl.sync.up", "shfl.sync.idx"), _shuffle),
    **dict.fromkeys(("redux.sync.min", "redux.sync.max", "redux.sync.add"), _reduce),
    **dict.fromkeys([f"ldmatrix.sync.aligned.{name}" for name in _MATRICES], _load_matrices),
    **dict.fromkeys([f"stmatrix.sync.aligned.{name}" for name in _MATRICES], _store_matrices),
    "mma.sync.aligned.m16n8k16.row.col": _multiply,
}
