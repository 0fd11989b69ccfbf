"""Compiles what a launcher would launch on a GPU, on a machine without one.

The launcher runs on small CPU tensors with its kernel replaced by a recorder, so what is compiled is what
would be launched, with Triton's own specialization of the arguments.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default, but Triton 3.9 warns without it

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

__all__ = ["KIB", "TARGETS", "Recorder", "Target", "recording"]

KIB = 1024
# Where the kernel ``_NAME_kernel`` is defined.
MODULES = {
    "attend": "vllm_quest.formats.auto.triton",
    "attend_int4": "vllm_quest.formats.int4.triton.attend",
    "dequantize": "vllm_quest.formats.int4.triton.dequantize",
    "store_int4": "vllm_quest.formats.int4.triton.store",
    "score": "vllm_quest.scorers.minmax.triton.score",
    "store": "vllm_quest.scorers.minmax.triton.store",
    "select": "vllm_quest.kernels.triton.select",
}


@dataclass(frozen=True)
class Target:
    gpu: GPUTarget
    architecture: str  # row of the launch table
    shared_limit: int  # bytes a program may have


# sm_80 stands for its whole family: sm_86 and sm_89 run the same launches with 99 KiB.
TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), "ampere", 99 * KIB),
    "sm_90": Target(GPUTarget("cuda", 90, 32), "hopper", 227 * KIB),
    "sm_100": Target(GPUTarget("cuda", 100, 32), "blackwell", 227 * KIB),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), "cdna", 64 * KIB),
}


class Recorder:
    """Takes the place of a kernel and keeps what it would have been launched with."""

    def __init__(self, kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid):
        self.grid = grid
        return self.record

    def record(self, *args, **kwargs) -> None:
        self.args, self.kwargs = args, kwargs

    def pack(self, gpu: GPUTarget):
        """As `JITFunction.run` does: arguments by name, their types, what to compile with which options."""
        backend = make_backend(gpu)
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialization, _ = bind(*self.args, **self.kwargs)
        options, signature, constants, attributes = self.kernel._pack_args(
            backend, self.kwargs, bound, specialization, None
        )
        return bound, signature, ASTSource(self.kernel, signature, constants, attributes), options.__dict__

    def compile(self, gpu: GPUTarget):
        """The kernel, for what it would have been launched with."""
        _, _, source, options = self.pack(gpu)
        return triton.compile(source, target=gpu, options=options)

    def parameters(self, gpu: GPUTarget) -> list:
        """The arguments that are not compiled in, in the order of the compiled kernel's parameters."""
        bound, signature, _, _ = self.pack(gpu)
        return list(_leaves(tuple(bound.values()), tuple(signature.values())))


def _leaves(values: tuple, kinds: tuple) -> Iterator:
    """The values in nested tuples that are not compiled in."""
    for value, kind in zip(values, kinds, strict=True):
        if isinstance(kind, tuple):
            yield from _leaves(value, kind)
        elif kind != "constexpr":
            yield value


@contextmanager
def recording(name: str, architecture: str) -> Iterator[Recorder]:
    """Replaces the kernel `name`, whose launcher believes to be on a GPU of `architecture`."""
    launch = importlib.import_module("vllm_quest.kernels.triton.launch")
    module = importlib.import_module(MODULES[name])
    recorder = Recorder(getattr(module, f"_{name}_kernel"))
    with (
        mock.patch.object(module, f"_{name}_kernel", recorder),
        mock.patch.object(launch, "architecture", return_value=architecture),
    ):
        yield recorder
