"""How attention kernels of all formats are launched: lists of pages, chunks of work, partial results."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from vllm_quest.kernels.cpu.launch import (
    check_integers,
    check_query,
    chunks_for_balance,
    use_torch_threads,
)

__all__ = ["attend"]

LEAST_PAGES = 8  # of one chunk, where a row's pages are cut into chunks
LOG2_E = math.log2(math.e)


def page_lists(
    page_indices: torch.Tensor | None, seq_lens: torch.Tensor, kv_heads: int, page_size: int
) -> tuple[int, tuple[int, int, int]]:
    """Entries of the longest list of pages, and the lists' address and strides, 0 where there are none."""
    if page_indices is None:
        longest = int(seq_lens.max()) if len(seq_lens) else 0
        return -(-longest // page_size), (0, 0, 0)
    rows, budget = len(seq_lens), page_indices.shape[-1]
    check_integers("page_indices", page_indices, torch.int32, rows)
    if page_indices.shape[1:] != (kv_heads, budget):
        raise ValueError(f"page_indices: expected [{rows}, {kv_heads}, K], got {tuple(page_indices.shape)}")
    return budget, (page_indices.data_ptr(), page_indices.stride(0), page_indices.stride(1))


def attend(
    kernel_for: Callable[[str, int, bool], Callable[..., None]],
    caches: tuple[int, ...],
    query: torch.Tensor,
    kv_heads: int,
    head_size: int,
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
    """Attention over the tokens of the selected pages only (section 3.3, "approximate attention").

    Args:
        kernel_for: The kernel for a query's dtype, a number of query heads per KV head, and whether there is
            a threshold.
        caches: Addresses and strides of the cache, as the kernel takes them.
        query: ``[R, Hq, D]`` float32, bfloat16 or float16, each head contiguous.
        kv_heads: H.
        head_size: D.
        block_table: ``[R, M]`` int32.
        seq_lens: ``[R]`` int32; the last page may be partly filled.
        page_indices: ``[R, H, K]`` int32 page numbers within the row's context, -1 for none. None: every row
            reads every page.
        page_size: Tokens per page.
        scale: Factor of q . k.
        sparse_context: Rows of fewer tokens read every page, whatever `page_indices` holds.
        value_threshold: t, positive: V rows with less than e^-t of the largest share of the softmax are left
            out (see the reference); None reads every V row.
        out: ``[R, Hq, D]`` in the query's dtype, contiguous; written. None: new memory.

    Returns:
        `out`; computed in float32. A row without any page is 0.
    """
    query_dtype = check_query(query, kv_heads, head_size)
    rows, num_heads, _ = query.shape
    check_integers("block_table", block_table, torch.int32, rows)
    check_integers("seq_lens", seq_lens, torch.int32, rows)
    budget, listed = page_lists(page_indices, seq_lens[:rows], kv_heads, page_size)
    kernel = kernel_for(query_dtype, num_heads // kv_heads, value_threshold is not None)
    threads = use_torch_threads()
    chunks = chunks_for_balance(max(1, rows * kv_heads), threads, max(1, budget // LEAST_PAGES))
    if out is None:
        out = torch.empty((rows, num_heads, head_size), dtype=query.dtype)
    if out.shape != query.shape or out.dtype != query.dtype or not out.is_contiguous():
        raise ValueError(
            f"out: expected contiguous {tuple(query.shape)} {query.dtype}, got {tuple(out.shape)} "
            f"{out.dtype} with strides {out.stride()}"
        )
    partial = torch.empty(rows * num_heads * chunks * (head_size + 2), dtype=torch.float32)
    counters = np.zeros(1 + rows * kv_heads, np.int64)
    kernel(
        threads, counters.ctypes.data, query.data_ptr(), query.stride(0), query.stride(1), *caches,
        block_table.data_ptr(), block_table.stride(0), seq_lens.data_ptr(), *listed, budget, sparse_context,
        partial.data_ptr(), out.data_ptr(), rows, kv_heads, chunks, scale * LOG2_E,
        (value_threshold or 0.0) * LOG2_E,
    )  # fmt: skip
    return out
