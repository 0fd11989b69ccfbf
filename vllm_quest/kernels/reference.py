"""Selection and attention of QUEST (arXiv 2406.10774) in plain torch: what every format and scorer shares.

With a format's ``reference`` (store) and a scorer's (summarize, score) this is the paper, read from top to
bottom; every compiled kernel is compared with it. The functions take strided views, so the order of K inside
a page does not matter to them. Letters for the shapes: see `vllm_quest.kernels`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["NO_PAGE", "attention", "select_pages", "tokens_to_read"]

NO_PAGE = -1


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


def tokens_to_read(
    page_indices: torch.Tensor | None,
    seq_lens: torch.Tensor,
    num_kv_heads: int,
    page_size: int,
    sparse_context: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of each row's selected pages, of all pages where the row reads everything.

    Args:
        page_indices: ``[R, H, K]`` int32 page numbers within the row's context, -1 for none. None: every row
            reads every page.
        seq_lens: ``[R]`` int32.
        num_kv_heads: H.
        page_size: Tokens per page, S.
        sparse_context: Rows of fewer tokens read every page, whatever `page_indices` holds.

    Returns:
        ``[R, H, K * S]`` int64 positions in the row's context, and which of them are read; the others are 0.
    """
    rows = len(seq_lens)
    every_page = torch.arange(-(-int(seq_lens.max()) // page_size), dtype=torch.int32)
    every_page = every_page.expand(rows, num_kv_heads, -1)
    if page_indices is None:
        page_indices = every_page
    elif sparse_context:
        width = max(page_indices.shape[2], every_page.shape[2])
        chosen, every_page = (
            torch.nn.functional.pad(pages, (0, width - pages.shape[2]), value=NO_PAGE)
            for pages in (page_indices, every_page)
        )
        page_indices = every_page.where(seq_lens[:, None, None] < sparse_context, chosen)
    tokens = page_indices.long()[..., None] * page_size + torch.arange(page_size)
    visible = (page_indices[..., None] != NO_PAGE) & (tokens < seq_lens[:, None, None, None])
    return tokens.where(visible, 0).flatten(2), visible.flatten(2)


def attention(
    query: torch.Tensor,
    read: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    seq_lens: torch.Tensor,
    page_indices: torch.Tensor | None,
    num_kv_heads: int,
    page_size: int,
    scale: float,
    *,
    sparse_context: int = 0,
    value_threshold: float | None = None,
) -> torch.Tensor:
    """Attention over the tokens of the selected pages only (section 3.3, "approximate attention").

    With `value_threshold` t, a V row is read only where, for a query head of its KV head, the token's share
    of the softmax exceeds e^-t of the largest share. The other tokens leave numerator and denominator of all
    heads of the group. Of n selected tokens, those that leave have less than n * e^-t of a head's softmax: in
    no channel does the output move by more than n * e^-t of the range of V there. A compiled kernel compares
    with the largest share that it has met so far; it keeps these tokens and perhaps more, so the bound holds.

    Args:
        query: ``[R, Hq, D]``.
        read: K and V in float32, ``[R, H, n, D]`` each, of tokens at positions ``[R, H, n]`` of the rows'
            contexts.
        seq_lens: ``[R]`` int32; the last page may be partly filled.
        page_indices: As for `tokens_to_read`.
        num_kv_heads: H.
        page_size: Tokens per page.
        scale: Factor of q . k.
        sparse_context: As for `tokens_to_read`.
        value_threshold: t, positive; None reads every V row.

    Returns:
        ``[R, Hq, D]`` float32.
    """
    rows, num_heads, head_size = query.shape
    tokens, visible = tokens_to_read(page_indices, seq_lens, num_kv_heads, page_size, sparse_context)
    keys, values = read(tokens)
    q = query.float().view(rows, num_kv_heads, num_heads // num_kv_heads, head_size)
    is_read = visible[:, :, None]
    logits = (q @ keys.mT * scale).masked_fill(~is_read, -torch.inf)
    if value_threshold is not None:
        near = logits > logits.amax(-1, keepdim=True) - value_threshold
        is_read = is_read & near.any(2, keepdim=True)
        logits = logits.masked_fill(~is_read, -torch.inf)
    values = values.masked_fill(~is_read.mT, 0)
    return (torch.softmax(logits, -1) @ values).view_as(query)
