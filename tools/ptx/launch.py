"""Compiles what a launcher would launch, and executes its grid on the launcher's CPU tensors."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable

import numpy as np
import torch

from tools.compile_check.recorder import TARGETS, Recorder, Target, recording
from tools.ptx.machine import WARP, Machine
from tools.ptx.memory import Memory
from tools.ptx.parse import parse
from tools.ptx.semantics import SEMANTICS

__all__ = ["execute"]

OWN_PARAMETERS = 2  # Triton adds two pointers to scratch memory, which no kernel of ours uses


def _bits(value) -> int:
    """A parameter as the kernel gets it."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    return struct.unpack("I", struct.pack("f", value))[0] if isinstance(value, float) else int(value)


def _content(tensor: torch.Tensor) -> tuple[int, np.ndarray]:
    """Where a tensor's memory begins, and its bytes."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), torch.empty(0, dtype=torch.uint8).set_(storage).numpy()


def _run(recorder: Recorder, target: Target) -> None:
    """The whole grid, one program after the other."""
    compiled = recorder.compile(target.gpu)
    kernel = parse(compiled.asm["ptx"])
    values = recorder.parameters(target.gpu)
    numbers = [*map(_bits, values), *[0] * OWN_PARAMETERS]
    symbols = {f"{kernel.name}_param_{index}": number for index, number in enumerate(numbers)}
    symbols["global_smem"] = 0
    # Parts of one cache share its memory.
    device = Memory(list(dict(_content(v) for v in values if isinstance(v, torch.Tensor)).items()))
    grid = (*recorder.grid, 1, 1)[:3]
    symbols |= {f"%nctaid.{axis}": size for axis, size in zip("xyz", grid, strict=True)}
    for program in itertools.product(*map(range, grid)):
        symbols |= {f"%ctaid.{axis}": index for axis, index in zip("xyz", program, strict=True)}
        threads, shared = WARP * compiled.metadata.num_warps, compiled.metadata.shared
        Machine(kernel, SEMANTICS, device, symbols, threads, shared).run()


def execute(kernel: str, call: Callable[[], object], target: str = "sm_90") -> None:
    """Runs a launcher whose kernel is executed instruction by instruction.

    Args:
        kernel: Name of the kernel's module.
        call: Calls the launcher, on CPU tensors.
        target: A target of the compile check; PTX is NVIDIA's.

    Raises:
        PtxError: At an instruction that is not known, or that accesses memory which is no argument's.
    """
    chosen = TARGETS[target]
    with recording(kernel, chosen.architecture) as recorder:
        call()
    _run(recorder, chosen)
