"""K and V in the model's dtype, in plain torch: store and attend."""

from __future__ import annotations

import torch

from vllm_quest.formats.auto import AutoCache
from vllm_quest.kernels.reference import attention

__all__ = ["attend_pages", "read", "store"]


def store(key: torch.Tensor, value: torch.Tensor, cache: AutoCache, slot_mapping: torch.Tensor) -> None:
    """Writes K and V of new tokens.

    Args:
        key: ``[T, H, D]``, the model's dtype.
        value: ``[T, H, D]``.
        cache: Written.
        slot_mapping: ``[T]`` int64, ``block * N + position in the block``; -1 is padding and is skipped.
    """
    real = slot_mapping >= 0
    slots, block_size = slot_mapping[real], cache.key.shape[2]
    block, position = slots // block_size, slots % block_size
    cache.key[block, :, position] = key[: len(real)][real]
    cache.value[block, :, position] = value[: len(real)][real]


def read(
    cache: AutoCache, block_table: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V in float32, ``[R, H, n, D]`` each, at positions `tokens`, ``[R, H, n]``, of the rows."""
    num_kv_heads, block_size = cache.key.shape[1:3]
    blocks = block_table.long().gather(1, (tokens // block_size).flatten(1)).view_as(tokens)
    place = blocks, torch.arange(num_kv_heads)[:, None], tokens % block_size
    return cache.key[place].float(), cache.value[place].float()


def attend_pages(
    query: torch.Tensor,
    cache: AutoCache,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    page_indices: torch.Tensor | None,
    page_size: int,
    scale: float,
    *,
    sparse_context: int = 0,
    value_threshold: float | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `kernels.reference.attention`, in the query's dtype; to `out` where it is given.

    Args:
        query: ``[R, Hq, D]``.
        cache: K and V.
        block_table: ``[R, M]`` int32.
        seq_lens: ``[R]`` int32; the last page may be partly filled.
        page_indices: ``[R, H, K]`` int32 page numbers within the row's context, -1 for none. None: every row
            reads every page.
        page_size: Tokens per page.
        scale: Factor of q . k.
        sparse_context: Rows of fewer tokens read every page, whatever `page_indices` holds.
        value_threshold: t, positive; None reads every V row.
        out: ``[R, Hq, D]`` in the query's dtype.
    """
    attended = attention(
        query,
        lambda tokens: read(cache, block_table, tokens),
        seq_lens,
        page_indices,
        cache.key.shape[1],
        page_size,
        scale,
        sparse_context=sparse_context,
        value_threshold=value_threshold,
    ).to(query.dtype)
    return attended if out is None else out.copy_(attended)
