"""The vocabulary in which formats and scorers say what they keep in a KV block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

__all__ = ["Block", "Part"]


class Part(NamedTuple):
    """One contiguous part of a (block, KV head) run."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that the part takes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Block:
    """The shape of one (block, KV head) run.

    Attributes:
        block_size: Tokens per block, N.
        page_size: Tokens per page, S; divides `block_size`.
        head_size: Channels per head, D.
        dtype: Of the model.
        channel_major: K lies channel by channel, as CPU kernels read it, instead of token by token.
    """

    block_size: int
    page_size: int
    head_size: int
    dtype: torch.dtype
    channel_major: bool

    @property
    def pages(self) -> int:
        """Pages per block, P."""
        return self.block_size // self.page_size

    @property
    def dense_token_bytes(self) -> int:
        """Bytes of K and V per (token, KV head) in the model's dtype."""
        return 2 * self.head_size * self.dtype.itemsize

    def split(self, kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a cache in the model's dtype, as vLLM's dense backend of the device lays it out.

        Args:
            kv: ``[B, H, N, 2 * D]``: K ``[D, N]`` and then V ``[N, D]`` where `channel_major`, else K and V
                of token 0, of token 1, ...

        Returns:
            K and V, ``[B, H, N, D]`` each: views.
        """
        if not self.channel_major:
            key, value = kv.chunk(2, -1)
            return key, value
        blocks, heads = kv.shape[:2]
        key, value = kv.view(blocks, heads, 2, self.block_size * self.head_size).unbind(2)
        return (
            key.view(blocks, heads, self.head_size, self.block_size).mT,
            value.view(blocks, heads, self.block_size, self.head_size),
        )
