"""A format that is not part of the package: K and V rounded to bfloat16, of which there is a reference only.

Register it as ``FORMATS["rounded"] = RoundedFormat``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from vllm_quest.formats.auto import AutoCache, AutoFormat
from vllm_quest.formats.auto.reference import attend_pages
from vllm_quest.formats.auto.reference import store as store_auto

__all__ = ["RoundedFormat", "attend_pages", "store"]


class RoundedFormat(AutoFormat):
    """As `KVFormat`; they lie as in ``auto``."""

    name: ClassVar[str] = "rounded"
    kernels: ClassVar[Mapping[str, str]] = {"reference": "tests.toy_format"}


def store(key: torch.Tensor, value: torch.Tensor, cache: AutoCache, slot_mapping: torch.Tensor) -> None:
    store_auto(key.bfloat16().to(key.dtype), value.bfloat16().to(value.dtype), cache, slot_mapping)
