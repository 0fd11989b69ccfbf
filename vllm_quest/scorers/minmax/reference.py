"""QUEST's scorer in plain torch: kmin and kmax of each page, and the bound that follows from them."""

from __future__ import annotations

from typing import Any

import torch

from vllm_quest.kernels.bounds import PageBounds, read_bounds, write_bounds

__all__ = ["score_pages", "summarize"]


def summarize(key: torch.Tensor, cache: Any, summary: PageBounds, slot_mapping: torch.Tensor) -> None:
    """Writes the bounds of every page that new tokens touch (section 3.2, "page metadata").

    A request fills a page from its first slot on, so the bounds of a touched page are those of its keys from
    the first slot to the last one written here. Older content of the page, a previous owner's or a rejected
    draft's, never enters them.

    Args:
        key: ``[T, H, D]``; the cache has them already.
        cache: Its `key` is ``[B, H, N, D]``.
        summary: Written.
        slot_mapping: ``[T]`` int64, ``block * N + position in the block``; -1 is padding and is skipped.
    """
    block_size, pages_per_block = cache.key.shape[2], summary.values.shape[2]
    page_size = block_size // pages_per_block
    slots = slot_mapping[slot_mapping >= 0]
    if slots.numel() == 0:
        return
    pages, owner = torch.unique(slots // page_size, return_inverse=True)
    last = torch.zeros_like(pages).scatter_reduce_(0, owner, slots % page_size, "amax")
    block, page = pages // pages_per_block, pages % pages_per_block
    positions = page[:, None] * page_size + torch.arange(page_size)
    keys = cache.key[block[:, None], :, positions]  # [pages, page_size, H, D]
    unwritten = (torch.arange(page_size) > last[:, None])[:, :, None, None]
    kmin = keys.masked_fill(unwritten, torch.inf).amin(1)
    kmax = keys.masked_fill(unwritten, -torch.inf).amax(1)
    write_bounds(summary, block, page, kmin.float(), kmax.float())


def score_pages(
    query: torch.Tensor,
    summary: PageBounds,
    block_table: torch.Tensor,
    num_pages: torch.Tensor,
    scale: float,
    group_reduce: str,
) -> torch.Tensor:
    """An upper bound of q . k over the keys of every page (equation 2), one score per KV head.

    Args:
        query: ``[R, Hq, D]``; query head h reads KV head ``h // (Hq / H)``.
        summary: kmin and kmax of each page.
        block_table: ``[R, M]`` int32, the row's blocks in order.
        num_pages: ``[R]`` int32, pages in the context of each row.
        scale: What attention multiplies q . k with; matters to ``softmax_mean`` only.
        group_reduce: ``max``, ``mean`` or ``softmax_mean`` over the query heads of a KV head.

    Returns:
        ``[R, H, M * P]`` float32; -inf where the row has no such page.
    """
    rows, num_heads, _ = query.shape
    num_kv_heads, pages_per_block = summary.values.shape[1:3]
    in_context = torch.arange(block_table.shape[1] * pages_per_block) < num_pages[:, None]
    blocks = block_table.long().where(in_context[:, ::pages_per_block], 0)
    row_bounds = read_bounds(summary, blocks)  # [R, M, H, P, 2, D]
    kmin, kmax = row_bounds.movedim(2, 1).flatten(2, 3).unbind(-2)  # each [R, H, M * P, D]
    q = query.float().view(rows, num_kv_heads, num_heads // num_kv_heads, 1, -1)
    scores = torch.maximum(q * kmin[:, :, None], q * kmax[:, :, None]).sum(-1)
    scores = scores.masked_fill(~in_context[:, None, None], -torch.inf)
    if group_reduce == "max":
        return scores.amax(2)
    if group_reduce == "mean":
        return scores.mean(2)
    return torch.softmax(scores * scale, -1).mean(2).masked_fill(~in_context[:, None], -torch.inf)
