"""PTX text to instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

__all__ = ["Address", "Instruction", "Kernel", "parse"]

TYPES = {"pred", "f16", "bf16", "f16x2", "bf16x2"} | {
    f"{kind}{bits}" for kind in "busf" for bits in (8, 16, 32, 64)
}
VECTORS = {"v2", "v4"}  # how many registers there are, the operand says as well
# Approximations are computed exactly and subnormal numbers are kept; all branches are uniform.
IGNORED = {"approx", "full", "ftz", "rn", "uni"}


class Address(NamedTuple):
    base: str  # a register, or a symbol
    offset: int


# A register or symbol, the bits of an immediate, a place in memory, or a vector of registers
Operand: TypeAlias = "str | int | Address | tuple[str, ...]"


@dataclass(frozen=True)
class Instruction:
    name: str  # the opcode without types: `mul.wide`, `ld.global`
    types: tuple[str, ...]
    operands: tuple[Any, ...]  # an `Operand` each; of which kind, the opcode says
    guard: str | None  # predicate register: threads in which it is false do nothing
    guard_negated: bool
    text: str


class Kernel(NamedTuple):
    name: str
    instructions: list[Instruction]
    labels: dict[str, int]  # index of the instruction that follows
    register_types: dict[str, str]  # of a register's name without its number


def _operand(text: str) -> Operand:
    text = text.strip()
    if text.startswith("{"):
        return tuple(part.strip() for part in text.strip("{} ").split(","))
    if text.startswith("["):
        base, _, offset = text.strip("[] ").partition("+")
        return Address(base.strip(), int(offset or "0", 0))
    if "|" in text:
        first, second = text.split("|")
        return (first, second)
    if text.startswith("0f"):
        return int(text[2:], 16)
    if re.match(r"-?\d", text):
        return int(text.rstrip("U"), 0)
    return text


def _instruction(text: str) -> Instruction:
    found = re.fullmatch(r"(?:@(!?%\w+)\s+)?(\S+)\s*(.*)", text)
    assert found is not None
    guard, opcode, arguments = found.groups()
    parts = opcode.split(".")
    names = [part for part in parts if part not in TYPES | VECTORS | IGNORED]
    # Commas inside of brackets belong to a vector.
    operands = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", arguments)
    return Instruction(
        ".".join(names),
        tuple(part for part in parts if part in TYPES),
        tuple(map(_operand, operands)),
        guard.lstrip("!") if guard else None,
        bool(guard) and guard.startswith("!"),
        " ".join(text.split()),
    )


def parse(ptx: str) -> Kernel:
    """The one kernel of a module."""
    entry = re.search(r"\.entry\s+(\w+)", ptx)
    assert entry is not None
    body = re.sub(r"//.*", "", ptx[ptx.index("\n{", ptx.index(".entry")) :])
    body = body[: body.rindex("\n}")]  # inline assembly has braces of its own
    body = re.sub(r"(?m)^\s*\.(?:loc|file)\b.*$", "", body)
    instructions: list[Instruction] = []
    labels, register_types = {}, {}
    for statement in body.split(";"):
        # Inline assembly is in braces.
        text = statement.strip().lstrip("{} \t\n")
        while found := re.match(r"(\$\w+):\s*", text):
            labels[found.group(1)] = len(instructions)
            text = text[found.end() :].lstrip("{} \t\n")
        if found := re.match(r"\.reg\s+\.(\w+)\s+(%\w+)<", text):
            register_types[found.group(2)] = found.group(1)
        elif found := re.match(r"\.reg\s+\.(\w+)\s+(.*)", text):  # of inline assembly, by their names
            register_types |= dict.fromkeys(re.findall(r"\w+", found.group(2)), found.group(1))
        elif text and not text.startswith("."):
            instructions.append(_instruction(text))
    return Kernel(entry[1], instructions, labels, register_types)
