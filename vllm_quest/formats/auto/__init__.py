"""K and V in the model's dtype, as vLLM's dense kernels of the device expect them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch

from vllm_quest.block import Block, Part
from vllm_quest.errors import QuestConfigError

if TYPE_CHECKING:
    from vllm_quest.config import QuestConfig

__all__ = ["AutoCache", "AutoFormat"]


class AutoCache(NamedTuple):
    """One layer's K and V."""

    key: torch.Tensor  # [B, H, N, D] in the model's dtype
    value: torch.Tensor  # likewise


class AutoFormat:
    """As `KVFormat`."""

    name: ClassVar[str] = "auto"
    page_size: ClassVar[int] = 8
    is_dense: ClassVar[bool] = True
    steps_alike: ClassVar[bool] = True
    kernels: ClassVar[Mapping[str, str]] = {
        device: f"vllm_quest.formats.auto.{device}" for device in ("reference", "cpu", "triton")
    }

    def __init__(self, config: QuestConfig) -> None:
        if config.value_group_size is not None:
            raise QuestConfigError(
                "value_group_size", f"{config.value_group_size}", "null unless kv_dtype=int4"
            )
        if config.bounds_dtype == "bfloat16":
            raise QuestConfigError("bounds_dtype", "'bfloat16'", "auto, int8 unless kv_dtype=int4")

    def cache_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def parts(self, block: Block) -> dict[str, Part]:
        return {"kv": Part((block.block_size, 2 * block.head_size), block.dtype)}

    def cache(self, parts: Mapping[str, torch.Tensor], block: Block) -> AutoCache:
        return AutoCache(*block.split(parts["kv"]))

    def element_bytes(self, block: Block) -> int:
        return block.dense_token_bytes

    def token_bytes(self, block: Block) -> int:
        return block.dense_token_bytes

    def page_bytes(self, block: Block) -> int:
        return 0

    def row_bytes(self, block: Block) -> int:
        return 0
