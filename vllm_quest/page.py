"""What lies where inside one KV block. The only owner of byte offsets.

vLLM hands every layer a cache ``[num_blocks, num_kv_heads, block_size, C]`` in the layout LBHNC, so that the
``block_size * C`` elements of one (block, KV head) are one contiguous run. QUEST chooses C and cuts the run
into the parts that the format and the scorer ask for, those of the format first:

    auto, CPU   | K [D, N] | V [N, D]                | bounds | their offsets and scales | padding |
    auto, GPU   | K, V of token 0 | of token 1 | ... | bounds | their offsets and scales | padding |
    int4        | K | V | zeros and scales of V | residuals | bounds | their offsets and scales | padding |

`auto` keeps K and V in the model's dtype: its part is what the device's dense kernels expect of a cache
without bounds. docs/int4.md explains `int4`. The bounds are those of ``minmax``, which borrows those of
`int4`. Whatever moves blocks (prefix caching, preemption, KV transfer) moves all of it with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from vllm_quest.block import Block, Part
from vllm_quest.formats import KVFormat
from vllm_quest.scorers import PageScorer

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import AttentionSpec

    from vllm_quest.config import QuestConfig

__all__ = ["PageLayout", "Pages"]

ALIGNMENT = 16  # bytes, of every part of a run


class Pages(NamedTuple):
    """Strided views into one layer's cache; none of them copies."""

    cache: Any  # K and V as the format stores them: a tuple with `key` and `value`
    summary: Any  # what the scorer keeps of the keys
    kv: torch.Tensor | None  # [B, H, N, 2 * D]: K and V as a dense backend reads them; None where it cannot


@dataclass(frozen=True)
class PageLayout:
    """The cut of one (block, KV head) run.

    Attributes:
        block: The run's shape.
        format: How K and V are stored.
        scorer: What is kept beside them.
    """

    block: Block
    format: KVFormat
    scorer: PageScorer

    def __post_init__(self) -> None:
        if self.block.block_size % self.block.page_size:
            raise ValueError(
                f"additional_config['quest'].page_size: {self.block.page_size} does not divide --block-size "
                f"{self.block.block_size}; allowed: a page_size that divides the block size"
            )
        _ = self._places  # a format or scorer may refuse the shape

    @classmethod
    def of(cls, spec: AttentionSpec, config: QuestConfig, dtype: torch.dtype, *, for_cpu: bool) -> PageLayout:
        """The layout of the layers that vLLM describes by `spec`; `dtype` is the model's."""
        # vLLM also asks about 1-token blocks.
        block_size = -(-spec.block_size // config.page_size) * config.page_size
        return cls.configured(config, block_size, spec.head_size, dtype, for_cpu=for_cpu)

    @classmethod
    def configured(
        cls, config: QuestConfig, block_size: int, head_size: int, dtype: torch.dtype, *, for_cpu: bool
    ) -> PageLayout:
        """What `config` makes of blocks of `block_size` tokens; `dtype` is the model's."""
        block = Block(block_size, config.page_size, head_size, dtype, channel_major=for_cpu)
        return cls(block, config.format, config.page_scorer)

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of the cache tensor."""
        return self.format.cache_dtype(self.block.dtype)

    @property
    def content_size(self) -> int:
        """Elements of `cache_dtype` per (token, KV head), C: K, V and this token's share of the rest."""
        end = max(offset + part.nbytes for offset, part in self._places.values())
        return -(-end // (self.block.block_size * self.cache_dtype.itemsize))

    @property
    def content_bytes(self) -> int:
        """Bytes per (token, KV head): vLLM's ``state_content_bytes``."""
        return self.content_size * self.cache_dtype.itemsize

    @property
    def metadata_share(self) -> float:
        """Part of the cache that is not an element of K or V."""
        return 1 - self.format.element_bytes(self.block) / self.content_bytes

    def bytes_read(self, *, rows: int, tokens: int, pages_read: int, pages_scored: int) -> int:
        """What sparse rows read of the cache, per KV head.

        Args:
            rows: How many rows.
            tokens: Tokens that they attend to, all together.
            pages_read: The pages of those tokens.
            pages_scored: Pages that they score.
        """
        return (
            rows * self.format.row_bytes(self.block)
            + tokens * self.format.token_bytes(self.block)
            + pages_read * self.format.page_bytes(self.block)
            + pages_scored * self.scorer.page_bytes(self.block, self.format)
        )

    @cached_property
    def _places(self) -> dict[str, tuple[int, Part]]:
        """Offset in bytes of each contiguous part of a run."""
        offset, placed = 0, {}
        for name, part in self._parts.items():
            offset = -(-offset // ALIGNMENT) * ALIGNMENT
            placed[name] = (offset, part)
            offset += part.nbytes
        return placed

    @property
    def _parts(self) -> dict[str, Part]:
        own, beside = self.format.parts(self.block), self.scorer.parts(self.block, self.format)
        if shared := own.keys() & beside.keys():
            raise ValueError(
                f"format {self.format.name} and scorer {self.scorer.name} both have parts {sorted(shared)}"
            )
        return own | beside

    def views(self, kv_cache: torch.Tensor, parameters: Any = None) -> Pages:
        """Cuts a layer's cache.

        Args:
            kv_cache: ``[B, H, N, C]`` of `cache_dtype`, each ``[N, C]`` run contiguous; C is at least
                `content_size`, and more where vLLM has made blocks larger since it asked.
            parameters: Of the layer, as its scorer has loaded them.

        Raises:
            ValueError: The cache does not have this layout.
        """
        content, block_size = kv_cache.shape[3], self.block.block_size
        if (
            kv_cache.shape[2] != block_size
            or content < self.content_size
            or kv_cache.stride()[2:] != (content, 1)
            or kv_cache.dtype != self.cache_dtype
        ):
            raise ValueError(
                f"expected a cache [B, H, {block_size}, C] of {self.cache_dtype}, C >= {self.content_size}, "
                f"with contiguous [N, C] runs, got {tuple(kv_cache.shape)} of {kv_cache.dtype} with strides "
                f"{kv_cache.stride()}"
            )
        parts = {name: self._cut(kv_cache, name) for name in self._places}
        cache = self.format.cache(parts, self.block)
        return Pages(
            cache,
            self.scorer.summary(parts, cache, self.block, parameters),
            parts["kv"] if self.format.is_dense else None,
        )

    def _cut(self, kv_cache: torch.Tensor, name: str) -> torch.Tensor:
        """One part of every run: ``[B, H, *shape]``."""
        offset, (shape, dtype) = self._places[name]
        cache = kv_cache.view(torch.uint8)
        *leading, last = shape
        in_bytes = (*cache.shape[:2], *leading, last * dtype.itemsize)
        strides = torch.empty(in_bytes[2:], device="meta").stride()
        part = cache.as_strided(in_bytes, (*cache.stride()[:2], *strides), cache.storage_offset() + offset)
        return part.view(dtype)
