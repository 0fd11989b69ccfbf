"""Where `vllm_quest.kernels.triton` runs in tests: on a GPU, or on CPU tensors under the interpreter.

Import this before the kernels. Triton reads TRITON_INTERPRET whenever it decorates a function. Its own
`tl.sum`, `tl.max`, ... were decorated when something (vLLM, say) first imported Triton, so they are decorated
anew. The variable is set for our kernels only: the engines that other tests start must not inherit it.
"""

from __future__ import annotations

import importlib
import os
from unittest import mock

import torch

from vllm_quest.formats import FORMATS
from vllm_quest.scorers import SCORERS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# A GPU takes 16-bit caches only. One rounding of the output, and on a GPU one of each softmax weight.
DTYPES = [torch.bfloat16, torch.float16] + ([torch.float32] if DEVICE.type == "cpu" else [])
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}

if DEVICE.type == "cpu":
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        import triton.language
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction

        for module in (triton.language, triton.language.standard):
            for name, member in list(vars(module).items()):
                if isinstance(member, JITFunction):
                    setattr(module, name, InterpretedFunction(member.fn))
        importlib.import_module(
            "triton.experimental.gluon"
        )  # a launch would, and asserts what the variable says
        importlib.import_module("vllm_quest.kernels.triton")
        for owner in (*FORMATS.values(), *SCORERS.values()):
            if "triton" in owner.kernels:
                importlib.import_module(owner.kernels["triton"])


def on_device(*arguments):
    """The arguments of an operation, tensors moved to where the kernels run, also those in tuples."""

    def moved(argument):
        if isinstance(argument, tuple):
            return type(argument)(*map(moved, argument))
        return argument.to(DEVICE) if isinstance(argument, torch.Tensor) else argument

    return tuple(map(moved, arguments))
