"""A scorer that keeps a number per token: its key's product with a direction of its layer and KV head.

There is a reference only. Register it as ``SCORERS["projected_key"] = ProjectedKeyScorer``.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch

from vllm_quest.block import Block, Part

__all__ = ["ProjectedKeyScorer", "ProjectedKeys", "direction", "score_pages", "summarize"]


class ProjectedKeys(NamedTuple):
    """What is kept of every token of a layer."""

    projection: torch.Tensor  # [B, H, N] float32
    direction: torch.Tensor  # [H, D] float32
    page_size: int


def direction(layer_name: str, num_kv_heads: int, head_size: int) -> torch.Tensor:
    """``[H, D]`` float32: a layer's own."""
    generator = torch.Generator().manual_seed(zlib.crc32(layer_name.encode()))
    return torch.randn(num_kv_heads, head_size, generator=generator)


class ProjectedKeyScorer:
    """As `PageScorer`; over every format.

    Attributes:
        HEAD_SIZE: Of the model.
        loaded: Layers whose parameters were asked for.
    """

    HEAD_SIZE: ClassVar[int] = 64
    loaded: ClassVar[list[str]] = []

    name: ClassVar[str] = "projected_key"
    borrows: ClassVar[tuple[str, ...]] = ()
    kernels: ClassVar[Mapping[str, str]] = {"reference": "tests.toy_token_scorer"}

    def __init__(self, config: Any) -> None:
        pass

    def parts(self, block: Block, kv_format: Any) -> dict[str, Part]:
        return {"projection": Part((block.block_size,), torch.float32)}

    def parameters(self, layer_name: str, num_kv_heads: int, device: torch.device) -> torch.Tensor:
        self.loaded.append(layer_name)
        return direction(layer_name, num_kv_heads, self.HEAD_SIZE).to(device)

    def summary(
        self, parts: Mapping[str, torch.Tensor], cache: Any, block: Block, parameters: Any
    ) -> ProjectedKeys:
        return ProjectedKeys(parts["projection"], parameters, block.page_size)

    def page_bytes(self, block: Block, kv_format: Any) -> int:
        return 4 * block.page_size

    def words(self, block: Block, kv_format: Any) -> str:
        return "projections of tokens 4 B"


def summarize(key: torch.Tensor, cache: Any, summary: ProjectedKeys, slot_mapping: torch.Tensor) -> None:
    """Appends; nothing that is there changes."""
    real, block_size = slot_mapping >= 0, summary.projection.shape[2]
    slots, key = slot_mapping[real], key[: len(slot_mapping)][real].float()
    summary.projection[slots // block_size, :, slots % block_size] = (key * summary.direction).sum(-1)


def score_pages(
    query: torch.Tensor,
    summary: ProjectedKeys,
    block_table: torch.Tensor,
    num_pages: torch.Tensor,
    scale: float,
    group_reduce: str,
) -> torch.Tensor:
    """The largest product of projections in a page, of a group's query heads; -inf without such a page.

    Slots of a page that is being filled may hold anything: that page is always read.
    """
    rows, num_heads, _ = query.shape
    heads, pages_per_block = summary.projection.shape[1], summary.projection.shape[2] // summary.page_size
    in_context = torch.arange(block_table.shape[1] * pages_per_block) < num_pages[:, None]
    blocks = block_table.long().where(in_context[:, ::pages_per_block], 0)
    tokens = summary.projection[blocks].transpose(1, 2).unflatten(3, (-1, summary.page_size))
    tokens = tokens.flatten(2, 3).nan_to_num()  # [R, H, M * P, S]
    q = query.float().view(rows, heads, num_heads // heads, -1)
    projected = (q * summary.direction[:, None]).sum(-1)  # [R, H, G]
    scores = (projected[..., None, None] * tokens[:, :, None]).amax((2, 4))
    return scores.masked_fill(~in_context[:, None], -torch.inf)
