"""QUEST (arXiv 2406.10774) in plain torch: store, score, select, attend.

Every kernel of this package is compared with these functions. They take strided views, so the order of K
inside a page does not matter to them. How bounds are encoded stands in `reference_bounds`; what differs where
the cache holds 4-bit codes, in `reference_int4`. Letters for the shapes: see `vllm_quest.kernels`.
"""

from __future__ import annotations

import torch

from vllm_quest.kernels.reference_bounds import read_bounds, write_bounds
from vllm_quest.kernels.reference_int4 import (
    dequantize_blocks,
    dequantized,
    filling_pages,
    limited,
    store_int4,
)
from vllm_quest.layout import Int4Keys, Int4Values, KeyCache, PageBounds, ValueCache

__all__ = ["attend_pages", "dequantize_blocks", "score_pages", "select_pages", "store"]

NO_PAGE = -1


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: KeyCache,
    value_cache: ValueCache,
    bounds: PageBounds,
    slot_mapping: torch.Tensor,
) -> None:
    """Writes K and V of new tokens and the bounds of every page they touch (section 3.2, "page metadata").

    A request fills a page from its first slot on, so the bounds of a touched page are those of its keys from
    the first slot to the last one written here. Older content of the page, a previous owner's or a rejected
    draft's, never enters them. (4-bit pages: `reference_int4.store_int4`.)

    Args:
        key: ``[T, H, D]``, the model's dtype.
        value: ``[T, H, D]``.
        key_cache: ``[B, H, N, D]`` in the model's dtype, or 4-bit codes; written.
        value_cache: Likewise.
        bounds: kmin and kmax of each page, written.
        slot_mapping: ``[T]`` int64, ``block * N + position in the block``; -1 is padding and is skipped.
    """
    if isinstance(key_cache, Int4Keys) and isinstance(value_cache, Int4Values):
        store_int4(key, value, key_cache, value_cache, slot_mapping)
        return
    assert isinstance(key_cache, torch.Tensor)
    assert isinstance(value_cache, torch.Tensor)
    block_size, pages_per_block = key_cache.shape[2], bounds.values.shape[2]
    page_size = block_size // pages_per_block
    real = slot_mapping >= 0
    slots = slot_mapping[real]
    if slots.numel() == 0:
        return
    block, position = slots // block_size, slots % block_size
    key_cache[block, :, position] = key[real]
    value_cache[block, :, position] = value[real]

    pages, owner = torch.unique(slots // page_size, return_inverse=True)
    last = torch.zeros_like(pages).scatter_reduce_(0, owner, slots % page_size, "amax")
    block, page = pages // pages_per_block, pages % pages_per_block
    positions = page[:, None] * page_size + torch.arange(page_size)
    keys = key_cache[block[:, None], :, positions]  # [pages, page_size, H, D]
    unwritten = (torch.arange(page_size) > last[:, None])[:, :, None, None]
    kmin = keys.masked_fill(unwritten, torch.inf).amin(1)
    kmax = keys.masked_fill(unwritten, -torch.inf).amax(1)
    write_bounds(bounds, block, page, kmin.float(), kmax.float())


def score_pages(
    query: torch.Tensor,
    bounds: PageBounds,
    block_table: torch.Tensor,
    num_pages: torch.Tensor,
    scale: float,
    group_reduce: str,
) -> torch.Tensor:
    """An upper bound of q . k over the keys of every page (equation 2), one score per KV head.

    Args:
        query: ``[R, Hq, D]``; query head h reads KV head ``h // (Hq / H)``.
        bounds: kmin and kmax of each page.
        block_table: ``[R, M]`` int32, the row's blocks in order.
        num_pages: ``[R]`` int32, pages in the context of each row.
        scale: What attention multiplies q . k with; matters to ``softmax_mean`` only.
        group_reduce: ``max``, ``mean`` or ``softmax_mean`` over the query heads of a KV head.

    Returns:
        ``[R, H, M * P]`` float32; -inf where the row has no such page.
    """
    rows, num_heads, _ = query.shape
    num_kv_heads, pages_per_block = bounds.values.shape[1:3]
    in_context = torch.arange(block_table.shape[1] * pages_per_block) < num_pages[:, None]
    blocks = block_table.long().where(in_context[:, ::pages_per_block], 0)
    row_bounds = read_bounds(bounds, blocks)  # [R, M, H, P, 2, D]
    kmin, kmax = row_bounds.movedim(2, 1).flatten(2, 3).unbind(-2)  # each [R, H, M * P, D]
    q = query.float().view(rows, num_kv_heads, num_heads // num_kv_heads, 1, -1)
    scores = torch.maximum(q * kmin[:, :, None], q * kmax[:, :, None]).sum(-1)
    scores = scores.masked_fill(~in_context[:, None, None], -torch.inf)
    if group_reduce == "max":
        return scores.amax(2)
    if group_reduce == "mean":
        return scores.mean(2)
    return torch.softmax(scores * scale, -1).mean(2).masked_fill(~in_context[:, None], -torch.inf)


def select_pages(
    page_scores: torch.Tensor,
    num_pages: torch.Tensor,
    budget_pages: int,
    sink_pages: int,
    recent_pages: int,
) -> torch.Tensor:
    """The pages to read: the first and the last ones always, the best scores in between (section 3.3).

    Ties go to the earlier page, so the selection is a function of its inputs.

    Args:
        page_scores: ``[R, H, pages]`` float32.
        num_pages: ``[R]`` int32, pages in the context of each row.
        budget_pages: K, at least ``sink_pages + recent_pages``.
        sink_pages: First pages that are always kept.
        recent_pages: Last pages that are always kept.

    Returns:
        ``[R, H, K]`` int32, ascending page numbers, then -1 where the context has fewer than K pages.
    """
    page = torch.arange(page_scores.shape[-1])
    total = num_pages[:, None]
    kept = ((page < sink_pages) | (page >= total - recent_pages)) & (page < total)
    scores = page_scores.masked_fill((page >= total)[:, None], -torch.inf)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    kept_first = kept[:, None].expand_as(order).gather(-1, order).sort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, kept_first.indices)[..., :budget_pages]
    order = torch.nn.functional.pad(order, (0, budget_pages - order.shape[-1]), value=page_scores.shape[-1])
    missing = order >= total[:, None]
    order = order.masked_fill(missing, page_scores.shape[-1]).sort(-1).values
    return order.masked_fill(order >= total[:, None], NO_PAGE).int()


def attend_pages(
    query: torch.Tensor,
    key_cache: KeyCache,
    value_cache: ValueCache,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    page_indices: torch.Tensor | None,
    page_size: int,
    scale: float,
    *,
    min_context: int = 0,
    value_threshold: float | None = None,
) -> torch.Tensor:
    """Attention over the tokens of the selected pages only (section 3.3, "approximate attention").

    With `value_threshold` t, a V row is read only where, for a query head of its KV head, the token's share
    of the softmax exceeds e^-t of the largest share. The other tokens leave numerator and denominator of all
    heads of the group. Of n selected tokens, those that leave have less than n * e^-t of a head's softmax: in
    no channel does the output move by more than n * e^-t of the range of V there. A compiled kernel compares
    with the largest share that it has met so far; it keeps these tokens and perhaps more, so the bound holds.

    Of 4-bit pages, the last one of a row is read with the residuals that it has while it is being filled.
    Their V may lie beyond float16, where zero points were rounded; outputs are limited to its largest number.

    Args:
        query: ``[R, Hq, D]``.
        key_cache: ``[B, H, N, D]`` in the model's dtype, or 4-bit codes.
        value_cache: Likewise.
        block_table: ``[R, M]`` int32.
        seq_lens: ``[R]`` int32; the last page may be partly filled.
        page_indices: ``[R, H, K]`` int32 page numbers within the row's context, -1 for none. None: every row
            reads every page.
        page_size: Tokens per page.
        scale: Factor of q . k.
        min_context: Rows of fewer tokens read every page, whatever `page_indices` holds.
        value_threshold: t, positive; None reads every V row.

    Returns:
        ``[R, Hq, D]`` in the query's dtype; computed in float32.
    """
    filling = None
    if isinstance(key_cache, Int4Keys) and isinstance(value_cache, Int4Values):
        filling = filling_pages(key_cache, value_cache, block_table, seq_lens)
        key_cache, value_cache = dequantized(key_cache, value_cache)
    assert isinstance(key_cache, torch.Tensor)
    assert isinstance(value_cache, torch.Tensor)
    rows, num_heads, head_size = query.shape
    num_kv_heads, block_size = key_cache.shape[1:3]
    every_page = torch.arange(-(-int(seq_lens.max()) // page_size), dtype=torch.int32)
    every_page = every_page.expand(rows, num_kv_heads, -1)
    if page_indices is None:
        page_indices = every_page
    elif min_context:
        width = max(page_indices.shape[2], every_page.shape[2])
        chosen, every_page = (
            torch.nn.functional.pad(pages, (0, width - pages.shape[2]), value=NO_PAGE)
            for pages in (page_indices, every_page)
        )
        page_indices = every_page.where(seq_lens[:, None, None] < min_context, chosen)
    tokens = page_indices.long()[..., None] * page_size + torch.arange(page_size)
    visible = (page_indices[..., None] != NO_PAGE) & (tokens < seq_lens[:, None, None, None])
    tokens = tokens.where(visible, 0).flatten(2)  # [R, H, K * page_size]
    blocks = block_table.long().gather(1, (tokens // block_size).flatten(1)).view_as(tokens)
    heads = torch.arange(num_kv_heads)[:, None]
    keys = key_cache[blocks, heads, tokens % block_size].float()  # [R, H, K * page_size, D]
    values = value_cache[blocks, heads, tokens % block_size].float()
    if filling is not None:
        in_last = (tokens // page_size == (seq_lens[:, None, None] - 1) // page_size)[..., None]
        place = torch.arange(rows)[:, None, None], heads, tokens % page_size
        keys, values = (
            torch.where(in_last, fine[place], coarse)
            for fine, coarse in zip(filling, (keys, values), strict=True)
        )
    q = query.float().view(rows, num_kv_heads, num_heads // num_kv_heads, head_size)
    read = visible.flatten(2)[:, :, None]
    logits = (q @ keys.mT * scale).masked_fill(~read, -torch.inf)
    if value_threshold is not None:
        near = logits > logits.amax(-1, keepdim=True) - value_threshold
        read = read & near.any(2, keepdim=True)
        logits = logits.masked_fill(~read, -torch.inf)
    values = values.masked_fill(~read.mT, 0)
    out = (torch.softmax(logits, -1) @ values).view_as(query)
    return out.to(query.dtype) if filling is None else limited(out, query.dtype)
