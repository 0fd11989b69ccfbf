"""One program: its registers, its shared memory, and the loop over its instructions."""

from __future__ import annotations

import numpy as np

from tools.ptx.memory import Memory
from tools.ptx.parse import Address, Instruction, Kernel

__all__ = ["HALVES", "WARP", "Machine", "PtxError", "as_bits", "dtype_of"]

WARP = 32
_KINDS = {"b": "u", "u": "u", "s": "i", "f": "f"}
HALVES = {"f16": 1, "bf16": 1, "f16x2": 2, "bf16x2": 2}  # numbers of 16 bits, and how many at once


class PtxError(Exception):
    """An instruction that is not known, or that a GPU would not have survived."""


def dtype_of(kind: str) -> np.dtype:
    """How numpy holds a PTX type; of numbers in 16 bits their bits."""
    if kind == "pred":
        return np.dtype(bool)
    if kind in HALVES:
        return np.dtype(f"u{2 * HALVES[kind]}")
    return np.dtype(f"{_KINDS[kind[0]]}{int(kind[1:]) // 8}")


def _as_float(bits: np.ndarray, kind: str) -> np.ndarray:
    """``[threads]``, or ``[threads, 2]`` with the low half first, float32 from one of HALVES."""
    halves = bits.view(np.uint16)
    if HALVES[kind] == 2:
        halves = halves.reshape(-1, 2)
    if kind.startswith("bf16"):
        return (halves.astype(np.uint32) << 16).view(np.float32)
    return halves.view(np.float16).astype(np.float32)


def as_bits(values: np.ndarray, kind: str) -> np.ndarray:
    """Numbers in float32 as one of HALVES, to the nearest: ``[threads]`` of what a register holds."""
    if kind.startswith("bf16"):
        bits = values.view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        halves = np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)
    else:
        halves = values.astype(np.float16).view(np.uint16)
    return halves.view(dtype_of(kind)).reshape(-1)


class Machine:
    """Threads in lockstep. A value of a register is an array ``[threads]`` of unsigned bits, or of bool."""

    def __init__(
        self,
        kernel: Kernel,
        semantics: dict,
        device: Memory,
        symbols: dict[str, int],
        threads: int,
        shared_size: int,
    ) -> None:
        """
        Args:
            kernel: What to run.
            semantics: Function of each instruction's name, called with the machine and the instruction.
            device: Device memory.
            symbols: Values of parameters, and the program's place in the grid.
            threads: In the program, whole warps.
            shared_size: Bytes of shared memory, which holds NaN at first.
        """
        unknown = {i.name: i.text for i in kernel.instructions if i.name not in semantics}
        if unknown:
            raise PtxError(f"unknown instructions: {', '.join(sorted(unknown.values()))}")
        self.kernel, self.semantics = kernel, semantics
        self.device, self.symbols, self.threads = device, symbols, threads
        self.shared = Memory([(0, np.full(shared_size, 255, np.uint8))])
        self.widths = {name: dtype_of(kind) for name, kind in kernel.register_types.items()}
        self.registers = {"%tid.x": np.arange(threads, dtype=np.uint32)}
        self.everyone = np.ones(threads, bool)
        self.active = self.everyone  # threads that take part in the current instruction
        self.next = 0
        # Copies to shared memory on their way: those of the group that is open, and of closed groups.
        self.copies: list[tuple] = []
        self.copy_groups: list[list[tuple]] = []

    def run(self) -> None:
        """To the end.

        Raises:
            PtxError: Names the instruction at which it went wrong.
        """
        with np.errstate(all="ignore"):
            while self.next < len(self.kernel.instructions):
                instruction = self.kernel.instructions[self.next]
                self.next += 1
                try:
                    self.active = self._guard(instruction)
                    self.semantics[instruction.name](self, instruction)
                except Exception as error:
                    raise PtxError(f"{instruction.text}: {error}") from error

    def _guard(self, instruction: Instruction) -> np.ndarray:
        if instruction.guard is None:
            return self.everyone
        active = self.registers[instruction.guard]
        return ~active if instruction.guard_negated else active

    def jump(self, index: int) -> None:
        """Goes on at an instruction, where the guard is true.

        Raises:
            PtxError: For some threads only.
        """
        if self.active.all():
            self.next = index
        elif self.active.any():
            raise PtxError("threads part ways")

    def read(self, operand: str | int, kind: str) -> np.ndarray:
        """``[threads]`` of a PTX type, HALVES as `_as_float` gives them; of a wider register the low bits."""
        dtype = dtype_of(kind)
        number = operand if isinstance(operand, int) else self.symbols.get(operand)
        if number is not None:
            bits = np.full(self.threads, number % 2 ** (8 * dtype.itemsize), f"u{dtype.itemsize}")
        else:
            bits = self.registers[str(operand)]
            if bits.dtype == bool:
                return bits
        if bits.itemsize > dtype.itemsize:
            bits = bits.astype(f"u{dtype.itemsize}")
        if kind in HALVES:
            return _as_float(bits, kind)
        return bits.astype(bool) if kind == "pred" else bits.view(dtype)

    def write(self, register: str, values: np.ndarray) -> None:
        """Into the active threads; signed integers keep their sign in a wider register."""
        if register == "_":
            return
        width = self.widths[register.rstrip("0123456789")]
        if (values.dtype.kind == "b") != (width.kind == "b") or values.itemsize > width.itemsize:
            raise PtxError(f"{values.dtype} into {register}")
        if values.dtype.kind == "f":
            values = values.view(f"u{values.itemsize}")
        bits = values.astype(width)
        if self.active is not self.everyone:
            poison = np.full(self.threads, 255, np.uint8).astype(width)
            bits = np.where(self.active, bits, self.registers.get(register, poison))
        self.registers[register] = bits

    def address(self, operand: Address) -> np.ndarray:
        """``[threads]`` int64."""
        wide = operand.base in self.registers and self.registers[operand.base].itemsize == 8
        return self.read(operand.base, "u64" if wide else "u32").astype(np.int64) + operand.offset
