"""Instructions between registers and memory, and those that say what comes next."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tools.ptx.machine import Machine, PtxError, dtype_of
from tools.ptx.memory import Memory
from tools.ptx.parse import Instruction

__all__ = ["TRANSFERS"]


def _memory(machine: Machine, instruction: Instruction) -> Memory:
    return machine.shared if ".shared" in instruction.name else machine.device


def _registers(operand) -> tuple[str, ...]:
    return operand if isinstance(operand, tuple) else (operand,)


def _load_parameter(machine: Machine, instruction: Instruction) -> None:
    result, address = instruction.operands
    if address.offset:
        raise PtxError("a part of a parameter")
    machine.write(result, machine.read(address.base, instruction.types[0]))


def _load(machine: Machine, instruction: Instruction) -> None:
    """`ld`: one register or a vector of them."""
    results, address = _registers(instruction.operands[0]), instruction.operands[1]
    dtype = dtype_of(instruction.types[0])
    size = dtype.itemsize * len(results)
    loaded = _memory(machine, instruction).load(machine.address(address), size, machine.active)
    for register, values in zip(results, loaded.view(dtype).T, strict=True):
        machine.write(register, values)


def _store(machine: Machine, instruction: Instruction) -> None:
    """`st`: one register or a vector of them."""
    address, sources = instruction.operands[0], _registers(instruction.operands[1])
    values = np.stack([machine.read(register, instruction.types[0]) for register in sources], 1)
    stored = values.view(np.uint8)
    _memory(machine, instruction).store(machine.address(address), stored, machine.active)


def _copy(machine: Machine, instruction: Instruction) -> None:
    """`cp.async`: what arrives in shared memory is seen there when the copy's group is waited for."""
    target, source, size, *given = instruction.operands
    read = machine.read(given[0], "u32") if given else np.full(machine.threads, size)
    if not np.isin(read[machine.active], (0, size)).all():
        raise PtxError("a copy of a part")
    values = machine.device.load(machine.address(source), size, machine.active & (read > 0))
    machine.copies.append((machine.address(target), values, machine.active))


def _commit(machine: Machine, instruction: Instruction) -> None:
    machine.copy_groups.append(machine.copies)
    machine.copies = []


def _wait(machine: Machine, instruction: Instruction) -> None:
    """Until at most so many groups are on their way, the latest ones."""
    while len(machine.copy_groups) > instruction.operands[0]:
        for copy in machine.copy_groups.pop(0):
            machine.shared.store(*copy)


def _atomic_add(machine: Machine, instruction: Instruction) -> None:
    """`atom.add`, one thread after the other."""
    result, address, operand = instruction.operands
    dtype = dtype_of(instruction.types[0])
    addresses, values = machine.address(address), machine.read(operand, instruction.types[0])
    found = np.zeros(machine.threads, dtype)
    for thread in np.flatnonzero(machine.active):
        alone = np.arange(machine.threads) == thread
        before = machine.device.load(addresses, dtype.itemsize, alone).view(dtype)[:, 0]
        machine.device.store(addresses, (before + values)[:, None].view(np.uint8), alone)
        found[thread] = before[thread]
    machine.write(result, found)


def _branch(machine: Machine, instruction: Instruction) -> None:
    machine.jump(machine.kernel.labels[instruction.operands[0]])


def _return(machine: Machine, instruction: Instruction) -> None:
    machine.jump(len(machine.kernel.instructions))


def _barrier(machine: Machine, instruction: Instruction) -> None:
    """Threads in lockstep have all arrived."""


TRANSFERS: dict[str, Callable[[Machine, Instruction], None]] = {
    "ld.param": _load_parameter,
    **dict.fromkeys(("ld.global", "ld.shared"), _load),
    **dict.fromkeys(("st.global", "st.shared", "st.shared::cta"), _store),
    **dict.fromkeys(("cp.async.ca.shared.global", "cp.async.cg.shared.global"), _copy),
    "cp.async.commit_group": _commit,
    "cp.async.wait_group": _wait,
    "atom.global.gpu.acq_rel.add": _atomic_add,
    "bra": _branch,
    "ret": _return,
    **dict.fromkeys(("bar.sync", "bar.warp.sync"), _barrier),
}
