"""Two kernels that need more registers than they are given; for a process without Triton's interpreter."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tools.compile_check.compiled import Figures, figures
from tools.compile_check.recorder import TARGETS, Recorder

__all__ = ["compiled_figures"]

SIZE = 2048  # 64 elements per thread


@triton.jit
def everywhere(x_ptr, out_ptr, count, SIZE: tl.constexpr):
    """Every iteration needs all that the one before it held."""
    offsets = tl.arange(0, SIZE)
    held = tl.load(x_ptr + offsets)
    for index in range(count):
        held = held * tl.load(x_ptr + index * SIZE + offsets) + tl.max(held, 0)
    tl.store(out_ptr + offsets, held)


@triton.jit
def around_the_loop(x_ptr, out_ptr, count, SIZE: tl.constexpr):
    """What is held before the loop is needed after it, and the loop itself needs little."""
    offsets = tl.arange(0, SIZE)
    held = tl.load(x_ptr + offsets)
    total = 0.0
    for index in range(count):
        total = total * 0.5 + tl.load(x_ptr + index * SIZE)
    tl.store(out_ptr + offsets, held * total + tl.max(held, 0))


def compiled_figures(name: str, registers: int) -> Figures:
    """Of a kernel of this module, compiled for sm_90 with that many registers per thread at most."""
    recorder = Recorder({"everywhere": everywhere, "around_the_loop": around_the_loop}[name])
    tensors = torch.zeros(SIZE), torch.zeros(SIZE)
    recorder[(1,)](*tensors, 99, SIZE=SIZE, num_warps=1, maxnreg=registers)
    return figures(recorder.compile(TARGETS["sm_90"].gpu))
