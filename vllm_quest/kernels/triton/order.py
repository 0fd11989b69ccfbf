"""How the launches of a step follow each other: a kernel starts before the one ahead of it has ended.

Programmatic dependent launch (NVIDIA, from Hopper on) hides what starting a kernel costs, a good part of a
small step. Every kernel launched so waits, before it reads or writes anything, until all that was launched
before it has ended and is visible.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from vllm_quest.kernels.triton.launch import starts_early

__all__ = ["early_start", "wait_for_inputs"]


@triton.jit
def wait_for_inputs(EARLY: tl.constexpr):
    """The first thing that a kernel does. When all programs have, the next launch may start, and wait."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def early_start(device: torch.device) -> dict[str, Any]:
    """What a launch is given, for `wait_for_inputs` too."""
    return {"EARLY": True, "launch_pdl": True} if starts_early(device) else {"EARLY": False}
