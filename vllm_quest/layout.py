"""What lies where inside one KV block. The only owner of byte offsets.

vLLM hands every layer a cache ``[num_blocks, num_kv_heads, block_size, C]`` in the layout LBHNC, so that the
``block_size * C`` elements of one (block, KV head) are one contiguous run. QUEST enlarges C and cuts the run:

    CPU   | K [D, N] | V [N, D]            | kmin, kmax of page 0 | of page 1 | ... | padding |
    GPU   | K, V of token 0 | of token 1 | ... | kmin, kmax of page 0 | of page 1 | ... | padding |

The first part is what the device's dense kernels expect of a cache without bounds. Whatever moves blocks
(prefix caching, preemption, KV transfer) moves the bounds with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

__all__ = ["PageLayout", "PageViews"]


class PageViews(NamedTuple):
    """Strided views into one layer's cache; none of them copies.

    B blocks, H KV heads, N tokens per block, D head size, P = N / page_size pages per block.
    """

    key: torch.Tensor  # [B, H, N, D]
    value: torch.Tensor  # [B, H, N, D]
    bounds: torch.Tensor  # [B, H, P, 2, D]: kmin, then kmax
    kv: torch.Tensor  # [B, H, N, 2 * D]: K and V of the run, as a dense backend of vLLM expects its cache


@dataclass(frozen=True)
class PageLayout:
    """The cut of one (block, KV head) run.

    Attributes:
        block_size: Tokens per block, N.
        page_size: Tokens per page; divides `block_size`.
        head_size: Channels per head, D.
        for_cpu: K lies as ``[D, N]`` before V (vLLM's CPU kernels), instead of beside V token by token.
    """

    block_size: int
    page_size: int
    head_size: int
    for_cpu: bool

    def __post_init__(self) -> None:
        if self.block_size % self.page_size:
            raise ValueError(
                f"additional_config['quest'].page_size: {self.page_size} does not divide --block-size "
                f"{self.block_size}; allowed: a page_size that divides the block size"
            )

    @property
    def pages_per_block(self) -> int:
        return self.block_size // self.page_size

    @staticmethod
    def content_size(page_size: int, head_size: int) -> int:
        """Elements per (token, KV head), C: K, V and this token's share of the page's bounds, rounded up."""
        return 2 * head_size + -(-2 * head_size // page_size)

    @property
    def metadata_share(self) -> float:
        """Part of the cache that is not K or V."""
        content = self.content_size(self.page_size, self.head_size)
        return (content - 2 * self.head_size) / content

    def views(self, kv_cache: torch.Tensor) -> PageViews:
        """Cuts a layer's cache.

        Args:
            kv_cache: ``[B, H, N, C]`` in the model's dtype, each ``[N, C]`` run contiguous.

        Raises:
            ValueError: The cache does not have this layout.
        """
        blocks, heads, tokens, content = kv_cache.shape
        expected = (self.block_size, self.content_size(self.page_size, self.head_size))
        if (tokens, content) != expected or kv_cache.stride()[2:] != (content, 1):
            raise ValueError(
                f"expected a cache [B, H, {expected[0]}, {expected[1]}] with contiguous [N, C] runs, got "
                f"{tuple(kv_cache.shape)} with strides {kv_cache.stride()}"
            )
        size, dim, pages = self.block_size, self.head_size, self.pages_per_block
        run = kv_cache.stride()[:2]
        start = kv_cache.storage_offset()

        def cut(offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
            return kv_cache.as_strided((blocks, heads, *shape), (*run, *stride), start + offset)

        token_stride = dim if self.for_cpu else 2 * dim
        return PageViews(
            key=cut(0, (size, dim), (1, size) if self.for_cpu else (token_stride, 1)),
            value=cut(size * dim if self.for_cpu else dim, (size, dim), (token_stride, 1)),
            bounds=cut(2 * size * dim, (pages, 2, dim), (2 * dim, dim, 1)),
            kv=cut(0, (size, 2 * dim), (2 * dim, 1)),
        )
