"""Which instructions of NVIDIA's machine code (SASS, as `nvdisasm -c` prints it) run more than once.

By the control flow, not by the range of a backward branch: ptxas puts what is seldom run behind the end of
the kernel, and the branch from there back into a loop spans everything between them.
"""

from __future__ import annotations

import re

import networkx

__all__ = ["in_loops"]

_LABEL = re.compile(r"(\S+):")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;")
_TARGET = re.compile(r"`\((\S+)\)")
# Without a guard in front and a further condition, so that what follows is not reached.
_LEAVES = re.compile(r"(?:EXIT|RET\b.*|BRA\S*\s+`\(\S+\))$")
_INDIRECT = re.compile(r"\b(?:BRX|BRXU|JMP|JMX|JMXU)\b")


def in_loops(sass: str) -> list[str]:
    """The instructions from which control can come back to them, and those of routines called there.

    Args:
        sass: One kernel.

    Raises:
        RuntimeError: A jump whose target is in a register.
    """
    instructions, labels = _parse(sass)
    flow = networkx.DiGraph()
    calls = {}
    for index, instruction in enumerate(instructions):
        flow.add_node(index)
        if _INDIRECT.search(instruction):
            raise RuntimeError(f"loops are not found: {instruction} can go anywhere")
        if index + 1 < len(instructions) and not _LEAVES.match(instruction):
            flow.add_edge(index, index + 1)
        target = _TARGET.search(instruction)
        if target is None or re.search(r"\bRET\b", instruction):
            continue
        if re.search(r"\bCALL\b", instruction):
            calls[index] = labels[target[1]]
        else:
            flow.add_edge(index, labels[target[1]])
    repeated = {
        index for part in networkx.strongly_connected_components(flow) if len(part) > 1 for index in part
    }
    for index in calls.keys() & repeated:
        repeated |= {calls[index]} | networkx.descendants(flow, calls[index])
    return [instructions[index] for index in sorted(repeated)]


def _parse(sass: str) -> tuple[list[str], dict[str, int]]:
    """The instructions in order, and by label the index of the one that it precedes."""
    instructions: list[str] = []
    labels = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append(found[1])
    return instructions, labels
