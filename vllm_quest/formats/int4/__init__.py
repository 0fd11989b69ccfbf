"""K and V in 4 bits, FlexGen and KIVI style. Drawn in docs/int4.md; `reference` is the definition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch

from vllm_quest.block import Block, Part
from vllm_quest.kernels.bounds import BoundsStorage, PageBounds

if TYPE_CHECKING:
    from vllm_quest.config import QuestConfig

__all__ = ["Int4Cache", "Int4Format", "Int4Keys", "Int4Values"]


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


class Int4Cache(NamedTuple):
    """One layer's K and V."""

    key: Int4Keys
    value: Int4Values

    @property
    def bounds(self) -> PageBounds:
        """The quantizer's range of each page, which is lent to scorers that keep kmin and kmax."""
        return self.key.bounds


class Int4Format:
    """As `KVFormat`.

    Attributes:
        range: How the range of a page's keys is stored.
    """

    name: ClassVar[str] = "int4"
    # Pages of 8 take more than a third of bfloat16's memory (docs/int4.md).
    page_size: ClassVar[int] = 16
    is_dense: ClassVar[bool] = False
    steps_alike: ClassVar[bool] = False  # a page's range grows with its tokens
    kernels: ClassVar[Mapping[str, str]] = {
        device: f"vllm_quest.formats.int4.{device}" for device in ("reference", "cpu", "triton")
    }

    def __init__(self, config: QuestConfig) -> None:
        self.range = BoundsStorage("int8" if config.bounds_dtype == "auto" else config.bounds_dtype)
        self._group_size = config.value_group_size

    def cache_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.uint8

    def parts(self, block: Block) -> dict[str, Part]:
        dim, pages, half, byte = block.head_size, block.pages, block.page_size // 2, torch.uint8
        page_key = (dim, half) if block.channel_major else (half, dim)
        return {
            "key": Part((pages, *page_key), byte),
            "value": Part((pages, half, dim), byte),
            "value_params": Part((block.block_size, self._groups(block), 2), torch.bfloat16),
            "key_residual": Part(page_key, byte),
            "value_residual": Part((half, dim), byte),
            **self.range.parts(block),
        }

    def cache(self, parts: Mapping[str, torch.Tensor], block: Block) -> Int4Cache:
        codes, residual = parts["key"], parts["key_residual"]
        if block.channel_major:
            codes, residual = codes.mT, residual.mT
        return Int4Cache(
            Int4Keys(codes, residual, self.range.view(parts)),
            Int4Values(parts["value"], parts["value_params"], parts["value_residual"]),
        )

    def element_bytes(self, block: Block) -> int:
        return block.head_size

    def token_bytes(self, block: Block) -> int:
        return block.head_size + 4 * self._groups(block)

    def page_bytes(self, block: Block) -> int:
        return self.range.page_bytes(block)

    def row_bytes(self, block: Block) -> int:
        """Both residuals, which are read with a context's last page."""
        return block.page_size * block.head_size

    def _groups(self, block: Block) -> int:
        """Groups of channels of V with a zero point and a scale of their own, G."""
        groups = -(-block.head_size // (self._group_size or block.head_size))
        if block.head_size % groups:
            raise ValueError(
                "additional_config['quest'].value_group_size does not divide the model's head size, "
                f"{block.head_size}"
            )
        return groups
