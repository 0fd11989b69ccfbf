"""A scorer that is not part of the package: the mean key of every page, of which there is a reference only.

Register it as ``SCORERS["mean_key"] = MeanKeyScorer``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch

from vllm_quest.block import Block, Part

__all__ = ["MeanKeyScorer", "MeanKeys", "score_pages", "summarize"]


class MeanKeys(NamedTuple):
    """The mean key of every page of a layer."""

    mean: torch.Tensor  # [B, H, P, D] float32
    page_size: int


class MeanKeyScorer:
    """As `PageScorer`; over every format."""

    name: ClassVar[str] = "mean_key"
    borrows: ClassVar[tuple[str, ...]] = ()
    kernels: ClassVar[Mapping[str, str]] = {"reference": "tests.toy_scorer"}

    def __init__(self, config: Any) -> None:
        pass

    def parts(self, block: Block, kv_format: Any) -> dict[str, Part]:
        return {"mean_key": Part((block.pages, block.head_size), torch.float32)}

    def parameters(self, layer_name: str, num_kv_heads: int, device: torch.device) -> Any:
        return None

    def summary(
        self, parts: Mapping[str, torch.Tensor], cache: Any, block: Block, parameters: Any
    ) -> MeanKeys:
        return MeanKeys(parts["mean_key"], block.page_size)

    def page_bytes(self, block: Block, kv_format: Any) -> int:
        return 4 * block.head_size

    def words(self, block: Block, kv_format: Any) -> str:
        return f"mean keys of {block.page_size} tokens {self.page_bytes(block, kv_format)} B"


def summarize(key: torch.Tensor, cache: Any, summary: MeanKeys, slot_mapping: torch.Tensor) -> None:
    """Of the keys from a page's first slot on; a rejected draft counts until the page starts anew."""
    mean, size = summary
    real = slot_mapping >= 0
    slots = slot_mapping[real]
    if slots.numel() == 0:
        return
    pages, owner = torch.unique(slots // size, return_inverse=True)
    older = torch.full_like(pages, size).scatter_reduce_(0, owner, slots % size, "amin")[:, None, None]
    new = torch.bincount(owner)[:, None, None]
    total = torch.zeros(len(pages), *key.shape[1:]).index_add_(0, owner, key[: len(real)][real].float())
    place = pages // mean.shape[2], slice(None), pages % mean.shape[2]
    total += torch.where(older > 0, mean[place] * older, 0)
    mean[place] = total / (older + new)


def score_pages(
    query: torch.Tensor,
    summary: MeanKeys,
    block_table: torch.Tensor,
    num_pages: torch.Tensor,
    scale: float,
    group_reduce: str,
) -> torch.Tensor:
    """q . mean key, the largest of a group's query heads; -inf where the row has no such page."""
    rows, num_heads, _ = query.shape
    num_kv_heads, pages_per_block = summary.mean.shape[1:3]
    in_context = torch.arange(block_table.shape[1] * pages_per_block) < num_pages[:, None]
    blocks = block_table.long().where(in_context[:, ::pages_per_block], 0)
    mean = summary.mean[blocks].movedim(2, 1).flatten(2, 3)  # [R, H, M * P, D]
    q = query.float().view(rows, num_kv_heads, num_heads // num_kv_heads, -1)
    return (q @ mean.mT).amax(2).masked_fill(~in_context[:, None], -torch.inf)
