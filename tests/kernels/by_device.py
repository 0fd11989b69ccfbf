"""The operations of each device, whichever format a cache has: `reference`, `cpu` and `triton`.

Where Triton is to run under its interpreter, import `tests.kernels.interpreter` before using `triton`.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from vllm_quest.formats.int4 import Int4Cache
from vllm_quest.page import Pages

__all__ = ["cpu", "reference", "triton"]


class Device:
    """What a device has for `auto`, `int4` and `minmax`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def _format(self, cache: Any) -> ModuleType:
        name = "int4" if isinstance(cache, Int4Cache) else "auto"
        return import_module(f"vllm_quest.formats.{name}.{self.name}")

    @property
    def _scorer(self) -> ModuleType:
        return import_module(f"vllm_quest.scorers.minmax.{self.name}")

    def store(self, key: torch.Tensor, value: torch.Tensor, pages: Pages, slots: torch.Tensor) -> None:
        if isinstance(pages.cache, Int4Cache):
            self._format(pages.cache).store(key, value, pages.cache, slots)
        elif self.name == "reference":
            self._format(pages.cache).store(key, value, pages.cache, slots)
            self._scorer.summarize(key, pages.cache, pages.summary, slots)
        else:
            self._scorer.store(key, value, pages.cache, pages.summary, slots)

    def score_pages(self, *arguments: Any, **options: Any) -> torch.Tensor:
        return self._scorer.score_pages(*arguments, **options)

    def select_pages(self, *arguments: Any, **options: Any) -> torch.Tensor:
        return import_module(f"vllm_quest.kernels.{self.name}").select_pages(*arguments, **options)

    def attend_pages(self, query: torch.Tensor, cache: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        return self._format(cache).attend_pages(query, cache, *arguments, **options)

    def dequantize_blocks(self, cache: Any, *arguments: Any) -> None:
        self._format(cache).dequantize_blocks(cache, *arguments)


reference, cpu, triton = Device("reference"), Device("cpu"), Device("triton")
