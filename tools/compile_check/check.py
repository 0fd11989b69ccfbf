"""One case, compiled for one target, and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass

from tools.compile_check.cases import cases
from tools.compile_check.compiled import Figures, figures, fills_wrongly, unaligned_pointers
from tools.compile_check.recorder import KIB, TARGETS, recording

__all__ = ["Result", "check"]


@dataclass(frozen=True)
class Result:
    kernel: str
    configuration: str
    target: str
    shared: int
    figures: Figures
    problem: str


def check(index: int, target_name: str) -> Result:
    """Compiles case `index` for a target."""
    case, target = cases()[index], TARGETS[target_name]
    with recording(case.kernel, target.architecture) as recorder:
        case.launch()
    compiled = recorder.compile(target.gpu)
    found, shared = figures(compiled), compiled.metadata.shared
    problems = {
        "spills": found.spills,
        f"more shared memory than {target.shared_limit // KIB} KiB": shared > target.shared_limit,
        "fills bytes by a mask": fills_wrongly(compiled.asm["ttgir"]),
        # The launchers' tensors are all aligned.
        "pointers of unknown alignment": bool(unaligned_pointers(compiled.asm["ttgir"])),
        # A page to dequantize can be smaller than what a wave loads with 16 bytes per thread.
        "no 16-byte loads": found.wide_loads == 0 and case.kernel != "dequantize",
    }
    problem = ", ".join(name for name, present in problems.items() if present)
    return Result(case.kernel, case.configuration, target_name, shared, found, problem)
