"""What lies where inside one KV block. The only owner of byte offsets.

vLLM hands every layer a cache ``[num_blocks, num_kv_heads, block_size, C]`` in the layout LBHNC, so that the
``block_size * C`` elements of one (block, KV head) are one contiguous run. QUEST chooses C and cuts the run:

    auto, CPU  | K [D, N] | V [N, D]                | bounds | their offsets and scales | padding |
    auto, GPU  | K, V of token 0 | of token 1 | ... | bounds | their offsets and scales | padding |
    int4       | K | V | zeros and scales of V | residuals | bounds | their offsets and scales | padding |

`auto` keeps K and V in the model's dtype: the first part is what the device's dense kernels expect of a cache
without bounds. docs/int4.md explains `int4`. Bounds are kmin and kmax of page 0, then of page 1, ...; offsets
and scales are there for 8-bit bounds only. Whatever moves blocks (prefix caching, preemption, KV transfer)
moves all of it with them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import AttentionSpec

    from vllm_quest.config import QuestConfig

__all__ = ["Int4Keys", "Int4Values", "KeyCache", "PageBounds", "PageLayout", "PageViews", "ValueCache"]

ALIGNMENT = 16  # bytes, of every part of a run


class PageBounds(NamedTuple):
    """kmin and kmax of every page of a layer."""

    values: torch.Tensor  # [B, H, P, 2, D]: kmin, then kmax; uint8 codes where there are params
    params: torch.Tensor | None  # [B, H, P, 2] float32, a and s: a code c stands for a + s * c


class Int4Keys(NamedTuple):
    """K in 4 bits, quantized per channel within a page; the page's bounds are the quantizer's range."""

    codes: torch.Tensor  # [B, H, P, S / 2, D] uint8: token i is the low nibble, token i + S / 2 the high one
    residual: torch.Tensor  # [B, H, S / 2, D] uint8: 4 more bits of each code of the page being filled
    bounds: PageBounds


class Int4Values(NamedTuple):
    """V in 4 bits, quantized per token, head and group of channels."""

    codes: torch.Tensor  # [B, H, P, S / 2, D] uint8, as those of K
    params: torch.Tensor  # [B, H, N, G, 2] bfloat16: zero point and scale of each group of D / G channels
    residual: torch.Tensor  # [B, H, S / 2, D] uint8: of the same page as that of K


KeyCache = torch.Tensor | Int4Keys  # [B, H, N, D] in the model's dtype, or 4-bit codes
ValueCache = torch.Tensor | Int4Values


class PageViews(NamedTuple):
    """Strided views into one layer's cache; none of them copies.

    B blocks, H KV heads, N tokens per block, D head size, S tokens per page, P = N / S pages per block.
    """

    key: KeyCache
    value: ValueCache
    bounds: PageBounds
    kv: torch.Tensor | None  # [B, H, N, 2 * D]: K and V as a dense backend expects its cache; None for int4


@dataclass(frozen=True)
class PageLayout:
    """The cut of one (block, KV head) run.

    Attributes:
        block_size: Tokens per block, N.
        page_size: Tokens per page, S; divides `block_size`.
        head_size: Channels per head, D.
        for_cpu: K lies channel by channel (``[D, N]`` before V; in int4 pages ``[D, S / 2]``), as CPU kernels
            read it, instead of token by token.
        dtype: Of the model.
        kv_dtype: ``auto`` (the model's dtype) or ``int4``.
        metadata_dtype: Of the bounds: ``auto`` (`bounds_dtype` decides), ``int8``, or ``bfloat16``.
        value_groups: Groups of channels of V with a zero point and a scale of their own, G; int4 only.
    """

    block_size: int
    page_size: int
    head_size: int
    for_cpu: bool
    dtype: torch.dtype
    kv_dtype: str = "auto"
    metadata_dtype: str = "auto"
    value_groups: int = 1

    def __post_init__(self) -> None:
        if self.block_size % self.page_size:
            raise ValueError(
                f"additional_config['quest'].page_size: {self.page_size} does not divide --block-size "
                f"{self.block_size}; allowed: a page_size that divides the block size"
            )
        if self.head_size % self.value_groups:
            raise ValueError(
                "additional_config['quest'].value_group_size does not divide the model's head size, "
                f"{self.head_size}"
            )

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
        return cls(
            block_size,
            config.page_size,
            head_size,
            for_cpu,
            dtype,
            config.kv_dtype,
            config.metadata_dtype,
            value_groups=-(-head_size // (config.value_group_size or head_size)),
        )

    @property
    def pages_per_block(self) -> int:
        return self.block_size // self.page_size

    @property
    def is_int4(self) -> bool:
        return self.kv_dtype == "int4"

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of the cache tensor: uint8 for int4 pages, else the model's."""
        return torch.uint8 if self.is_int4 else self.dtype

    @property
    def bounds_dtype(self) -> torch.dtype:
        """Of a stored kmin or kmax; uint8 where they are codes, as in int4 pages unless told otherwise."""
        if self.metadata_dtype == "auto":
            return torch.uint8 if self.is_int4 else self.dtype
        return torch.uint8 if self.metadata_dtype == "int8" else torch.bfloat16

    @property
    def has_coded_bounds(self) -> bool:
        """Whether bounds are 8-bit codes, with an offset and a scale per page."""
        return self.bounds_dtype == torch.uint8

    @property
    def content_size(self) -> int:
        """Elements of `cache_dtype` per (token, KV head), C: K, V and this token's share of the rest."""
        end = max(offset + math.prod(shape) * dtype.itemsize for offset, shape, dtype in self._parts.values())
        return -(-end // (self.block_size * self.cache_dtype.itemsize))

    @property
    def content_bytes(self) -> int:
        """Bytes per (token, KV head): vLLM's ``state_content_bytes``."""
        return self.content_size * self.cache_dtype.itemsize

    @property
    def dense_bytes(self) -> int:
        """Bytes of K and V per (token, KV head) in the model's dtype."""
        return 2 * self.head_size * self.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V per (token, KV head) as they are stored, zero points and scales of V included."""
        return self.head_size + 4 * self.value_groups if self.is_int4 else self.dense_bytes

    @property
    def residual_bytes(self) -> int:
        """Bytes of both residuals per (block, KV head), which are read with a context's last page."""
        return self.page_size * self.head_size if self.is_int4 else 0

    @property
    def bounds_bytes(self) -> int:
        """Bytes of the bounds per (page, KV head), their offset and scale included."""
        params = 8 if self.has_coded_bounds else 0
        return 2 * self.head_size * self.bounds_dtype.itemsize + params

    @property
    def metadata_share(self) -> float:
        """Part of the cache that is not an element of K or V."""
        elements = self.head_size if self.is_int4 else self.dense_bytes
        return 1 - elements / self.content_bytes

    @cached_property
    def _parts(self) -> dict[str, tuple[int, tuple[int, ...], torch.dtype]]:
        """Offset in bytes, shape and dtype of each contiguous part of a run."""
        size, dim, pages, half = self.block_size, self.head_size, self.pages_per_block, self.page_size // 2
        byte = torch.uint8
        if self.is_int4:
            page_key = (dim, half) if self.for_cpu else (half, dim)
            parts = {
                "key": ((pages, *page_key), byte),
                "value": ((pages, half, dim), byte),
                "value_params": ((size, self.value_groups, 2), torch.bfloat16),
                "key_residual": (page_key, byte),
                "value_residual": ((half, dim), byte),
            }
        else:
            parts = {"kv": ((size, 2 * dim), self.dtype)}
        parts["bounds"] = ((pages, 2, dim), self.bounds_dtype)
        if self.has_coded_bounds:
            parts["bound_params"] = ((pages, 2), torch.float32)
        offset, placed = 0, {}
        for name, (shape, dtype) in parts.items():
            offset = -(-offset // ALIGNMENT) * ALIGNMENT
            placed[name] = (offset, shape, dtype)
            offset += math.prod(shape) * dtype.itemsize
        return placed

    def views(self, kv_cache: torch.Tensor) -> PageViews:
        """Cuts a layer's cache.

        Args:
            kv_cache: ``[B, H, N, C]`` of `cache_dtype`, each ``[N, C]`` run contiguous; C is at least
                `content_size`, and more where vLLM has made blocks larger since it asked.

        Raises:
            ValueError: The cache does not have this layout.
        """
        content = kv_cache.shape[3]
        if (
            kv_cache.shape[2] != self.block_size
            or content < self.content_size
            or kv_cache.stride()[2:] != (content, 1)
            or kv_cache.dtype != self.cache_dtype
        ):
            raise ValueError(
                f"expected a cache [B, H, {self.block_size}, C] of {self.cache_dtype}, C >= "
                f"{self.content_size}, with contiguous "
                f"[N, C] runs, got {tuple(kv_cache.shape)} of {kv_cache.dtype} with strides "
                f"{kv_cache.stride()}"
            )
        parts = {name: self._cut(kv_cache, name) for name in self._parts}
        bounds = PageBounds(parts["bounds"], parts.get("bound_params"))
        if self.is_int4:
            codes, residual = parts["key"], parts["key_residual"]
            if self.for_cpu:
                codes, residual = codes.mT, residual.mT
            values = Int4Values(parts["value"], parts["value_params"], parts["value_residual"])
            return PageViews(Int4Keys(codes, residual, bounds), values, bounds, None)
        kv = parts["kv"]
        return PageViews(*self.split(kv), bounds, kv)

    def split(self, kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V, ``[B, H, N, D]`` each, of a dense cache ``[B, H, N, 2 * D]`` in the device's order."""
        if not self.for_cpu:
            key, value = kv.chunk(2, -1)
            return key, value
        blocks, heads, size, dim = *kv.shape[:3], self.head_size
        key, value = kv.view(blocks, heads, 2, size * dim).unbind(2)
        return key.view(blocks, heads, dim, size).mT, value.view(blocks, heads, size, dim)

    def _cut(self, kv_cache: torch.Tensor, name: str) -> torch.Tensor:
        """One part of every run: ``[B, H, *shape]``."""
        offset, shape, dtype = self._parts[name]
        cache = kv_cache.view(torch.uint8)
        *leading, last = shape
        in_bytes = (*cache.shape[:2], *leading, last * dtype.itemsize)
        strides = torch.empty(in_bytes[2:], device="meta").stride()
        part = cache.as_strided(in_bytes, (*cache.stride()[:2], *strides), cache.storage_offset() + offset)
        return part.view(dtype)
