"""QUEST's own score: kmin and kmax of every page, and from them a bound of any key's logit (equation 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from vllm_quest.block import Block, Part
from vllm_quest.kernels.bounds import BoundsStorage

if TYPE_CHECKING:
    from vllm_quest.config import QuestConfig
    from vllm_quest.formats import KVFormat

__all__ = ["MinMaxScorer"]


class MinMaxScorer:
    """As `PageScorer`. 4-bit pages lend the range that they are quantized with."""

    name: ClassVar[str] = "minmax"
    borrows: ClassVar[tuple[str, ...]] = ("int4",)
    kernels: ClassVar[Mapping[str, str]] = {
        device: f"vllm_quest.scorers.minmax.{device}" for device in ("reference", "cpu", "triton")
    }

    def __init__(self, config: QuestConfig) -> None:
        self._bounds = BoundsStorage(config.bounds_dtype)

    def parts(self, block: Block, kv_format: KVFormat) -> dict[str, Part]:
        return {} if kv_format.name in self.borrows else self._bounds.parts(block)

    def parameters(self, layer_name: str, num_kv_heads: int, device: torch.device) -> Any:
        return None

    def summary(self, parts: Mapping[str, torch.Tensor], cache: Any, block: Block, parameters: Any) -> Any:
        """`PageBounds`."""
        return self._bounds.view(parts) if "bounds" in parts else cache.bounds

    def page_bytes(self, block: Block, kv_format: KVFormat) -> int:
        return self._stored(kv_format).page_bytes(block)

    def words(self, block: Block, kv_format: KVFormat) -> str:
        return self._stored(kv_format).words(block)

    def _stored(self, kv_format: Any) -> BoundsStorage:
        return kv_format.range if kv_format.name in self.borrows else self._bounds
