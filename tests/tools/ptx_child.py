"""For a process of its own: where Triton's interpreter runs our kernels, nothing of them can be compiled."""

from __future__ import annotations

import importlib

__all__ = ["run"]


def run(case: str, *arguments):
    """What a function of `tests.tools.ptx_cases` returns."""
    return getattr(importlib.import_module("tests.tools.ptx_cases"), case)(*arguments)
