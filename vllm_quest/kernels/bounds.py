"""kmin and kmax of a page, and how they are stored: exactly, or rounded outward so that they stay bounds.

In 8 bits, the codes of a page share one offset and one scale over all channels of both bounds: a scale per
channel would weigh as much as the codes. With a step of 1/255 of the page's span, kmin is rounded down to a
step and kmax up. "Outward" holds up to the rounding of float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vllm_quest.block import Block, Part

__all__ = ["BoundsStorage", "PageBounds", "read_bounds", "round_down", "round_up", "write_bounds"]

CODES = 255
FLOAT32_MAX = torch.finfo(torch.float32).max
TINY = 2.0**-120  # below this a step counts as 0: its reciprocal would not be finite
LARGER = 1 + 2.0**-20  # a step this much larger reaches the top in 255 steps, whatever float32 rounds away


class PageBounds(NamedTuple):
    """kmin and kmax of every page of a layer."""

    values: torch.Tensor  # [B, H, P, 2, D]: kmin, then kmax; uint8 codes where there are params
    params: torch.Tensor | None  # [B, H, P, 2] float32, a and s: a code c stands for a + s * c


@dataclass(frozen=True)
class BoundsStorage:
    """How the bounds of a block's pages are stored.

    Attributes:
        name: ``auto`` (the model's dtype), ``int8`` (8-bit codes) or ``bfloat16``.
    """

    name: str

    def dtype(self, block: Block) -> torch.dtype:
        """Of a stored kmin or kmax; uint8 where they are codes."""
        return {"auto": block.dtype, "int8": torch.uint8, "bfloat16": torch.bfloat16}[self.name]

    def parts(self, block: Block) -> dict[str, Part]:
        """kmin and kmax of page 0, then of page 1, ...; then, for codes, an offset and a scale per page."""
        dtype = self.dtype(block)
        parts = {"bounds": Part((block.pages, 2, block.head_size), dtype)}
        if dtype == torch.uint8:
            parts["bound_params"] = Part((block.pages, 2), torch.float32)
        return parts

    def view(self, parts: Mapping[str, torch.Tensor]) -> PageBounds:
        """The bounds in the parts of a layer's cache."""
        return PageBounds(parts["bounds"], parts.get("bound_params"))

    def page_bytes(self, block: Block) -> int:
        """Bytes per (page, KV head), offset and scale included."""
        return sum(part.nbytes for part in self.parts(block).values()) // block.pages

    def words(self, block: Block) -> str:
        """For people: what the bounds of a page take."""
        dtype = self.dtype(block)
        name = "int8" if dtype == torch.uint8 else str(dtype).removeprefix("torch.")
        return f"bounds of {block.page_size} tokens {self.page_bytes(block)} B ({name})"


def round_down(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The largest number of `dtype` that is not above each of the float32 `values`."""
    rounded = values.to(dtype)
    lower = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
    return torch.where(rounded.float() > values, lower, rounded)


def round_up(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The smallest number of `dtype` that is not below each of the float32 `values`."""
    return -round_down(-values, dtype)


def write_bounds(
    bounds: PageBounds,
    block: torch.Tensor,
    page: torch.Tensor,
    kmin: torch.Tensor,
    kmax: torch.Tensor,
    goes_on: torch.Tensor | None = None,
) -> None:
    """Stores the bounds of n pages.

    Args:
        bounds: Written.
        block: ``[n]`` int64.
        page: ``[n]`` int64, within the block.
        kmin: ``[n, H, D]`` float32.
        kmax: ``[n, H, D]`` float32.
        goes_on: ``[n]`` bool, pages whose stored bounds are widened by the new ones; none unless given.
    """
    if goes_on is not None:
        old = read_bounds(bounds, block)[torch.arange(len(block)), :, page]  # [n, H, 2, D]
        kmin = torch.where(goes_on[:, None, None], torch.minimum(kmin, old[:, :, 0]), kmin)
        kmax = torch.where(goes_on[:, None, None], torch.maximum(kmax, old[:, :, 1]), kmax)
    if bounds.params is None:
        bounds.values[block, :, page, 0] = round_down(kmin, bounds.values.dtype)
        bounds.values[block, :, page, 1] = round_up(kmax, bounds.values.dtype)
        return
    kmin, kmax = kmin.clamp(-FLOAT32_MAX, FLOAT32_MAX), kmax.clamp(-FLOAT32_MAX, FLOAT32_MAX)
    offset, top = kmin.amin(-1), kmax.amax(-1)  # [n, H]
    scale = (top / CODES - offset / CODES) * LARGER
    stays = torch.zeros_like(offset, dtype=torch.bool)
    if goes_on is not None:
        # Where the old offset and scale reach, they stay, and so do the codes of bounds that did not move:
        # each change would round all of them outward once more.
        old_offset, old_scale = bounds.params[block, :, page].unbind(-1)
        stays = goes_on[:, None] & (old_offset <= offset) & (old_offset + CODES * old_scale >= top)
        offset, scale = torch.where(stays, old_offset, offset), torch.where(stays, old_scale, scale)
    inverse = torch.where(scale > TINY, 1 / scale, 0)
    moved = torch.stack((kmin, kmax), 2) - offset[..., None, None]
    steps = moved * inverse[..., None, None]
    codes = torch.stack((steps[:, :, 0].floor(), steps[:, :, 1].ceil()), 2).clamp(0, CODES).byte()
    if goes_on is not None:
        unmoved = stays[..., None, None] & (torch.stack((kmin, kmax), 2) == old)
        codes = torch.where(unmoved, bounds.values[block, :, page], codes)
    bounds.values[block, :, page] = codes
    bounds.params[block, :, page] = torch.stack((offset, scale), -1)


def read_bounds(bounds: PageBounds, blocks: torch.Tensor) -> torch.Tensor:
    """kmin and kmax of all pages of `blocks` in float32: ``[*blocks.shape, H, P, 2, D]``."""
    values = bounds.values[blocks].float()
    if bounds.params is None:
        return values
    offset, scale = bounds.params[blocks][..., None, None].unbind(-3)  # each [*blocks.shape, H, P, 1, 1]
    return offset + scale * values
