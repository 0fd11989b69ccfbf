"""A kernel that takes structs; for a process without Triton's interpreter."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from tools.compile_check.compiled import Figures, figures, unaligned_pointers
from tools.compile_check.recorder import TARGETS, Recorder

__all__ = ["SIZE", "compiled_struct"]

SIZE = 2048


class Rows(NamedTuple):
    data: Any
    nothing: Any
    stride: Any
    one: Any


@triton.jit
def copy_rows(source, target, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    row = tl.program_id(0)
    held = tl.load(source.data + row * source.stride + offsets * source.one)
    if source.nothing is None:
        tl.store(target.data + row * target.stride + offsets * target.one, held)


def compiled_struct(offset: int) -> tuple[list[str], Figures, list]:
    """Of `copy_rows` to a tensor `offset` elements behind an aligned one.

    Returns:
        Its unaligned pointers; its figures; its parameters, a tensor as its number of dimensions.
    """
    recorder = Recorder(copy_rows)
    source, target = torch.zeros(2, SIZE), torch.zeros(2 * SIZE + 1)[offset:]
    recorder[(2,)](Rows(source, None, SIZE, 1), Rows(target, None, SIZE, 1), SIZE=SIZE, num_warps=1)
    gpu = TARGETS["sm_90"].gpu
    compiled, parameters = recorder.compile(gpu), recorder.parameters(gpu)
    seen = [value.dim() if isinstance(value, torch.Tensor) else value for value in parameters]
    return unaligned_pointers(compiled.asm["ttgir"]), figures(compiled), seen
