"""`attend_pages`, compiled: attention over the selected pages with an online softmax in float32.

The query heads of a KV head are processed together, so each K and V element is loaded once. K is
channel-major: a vector holds one channel of consecutive tokens, and logits need no sum across lanes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from numba import njit, prange

from vllm_quest.config import PAGE_SIZES
from vllm_quest.kernels.cpu.attend_int4 import kernel_for_int4
from vllm_quest.kernels.cpu.elements import SIZE
from vllm_quest.kernels.cpu.launch import (
    CACHE_LINE,
    INSTRUCTIONS,
    KERNEL_OPTIONS,
    REGISTERS,
    TILE_TOKENS,
    addresses_of,
    check_caches,
    check_integers,
    check_query,
    chunks_for_balance,
    largest_divisor,
    use_torch_threads,
)
from vllm_quest.kernels.cpu.memory import (
    advance,
    get,
    load_tile,
    next_item,
    page_start,
    pointer,
    prefetch,
    stack,
    store,
)
from vllm_quest.kernels.cpu.simd import multiply_add_outer, zeros
from vllm_quest.kernels.cpu.softmax import (
    begin,
    hide,
    hide_far,
    keep,
    merge,
    page_at,
    pages_to_read,
    raise_tops,
    to_weights,
    visible_tokens,
)
from vllm_quest.layout import Int4Keys, Int4Values, KeyCache, ValueCache

__all__ = ["attend_pages"]

LANES = 16
LEAST_PAGES = 8  # of one chunk, where a row's pages are cut into chunks
LOG2_E = math.log2(math.e)


@cache
def attend_kernel(
    dtype: str, query_dtype: str, head_size: int, group: int, page_size: int, block_size: int, skips: bool
):
    """The kernel of one configuration; `group` query heads share a KV head; `skips`: there is a threshold.

    A work item is (row, KV head, chunk of its pages). It leaves its unnormalized output, maximum and sum in
    `partial`, and the last item of a (row, KV head) to finish merges them.
    """
    build = INSTRUCTIONS
    query_size = group * head_size
    token_lanes = min(LANES, page_size)
    token_cols = largest_divisor(page_size // token_lanes, REGISTERS // group)
    key_step = token_lanes * token_cols
    channel_cols = largest_divisor(head_size // LANES, REGISTERS // group)
    value_step = LANES * channel_cols
    tile_tokens = max(TILE_TOKENS, page_size)
    tile_pages = tile_tokens // page_size
    weights_size = group * tile_tokens
    pages_per_block = block_size // page_size
    partial_size = group * (head_size + 2)
    line = CACHE_LINE // SIZE[dtype]

    @njit(**KERNEL_OPTIONS)
    def kernel(
        threads, counter, query, query_row, query_head, key_cache, key_block, key_head, value_cache,
        value_block, value_head, block_table, table_row, seq_lens, page_indices, index_row, index_head,
        budget, min_context, partial, out, rows, kv_heads, chunks, scale_log2, farthest,
    ):  # fmt: skip
        build  # noqa: B018
        for _ in prange(threads):
            q, weighted = stack("float32", query_size), stack("float32", query_size)
            tops, sums = stack("float32", group), stack("float32", group)
            weights, nearness = stack("float32", weights_size), stack("float32", tile_tokens)
            limit = np.float32(farthest)
            while True:
                item = next_item(pointer(counter, "int64"))
                owner, chunk = item // chunks, item % chunks
                row, head = owner // kv_heads, owner % kv_heads
                if row >= rows:
                    break
                seq_len = get(pointer(seq_lens, "int32"), row)
                table = advance(pointer(block_table, "int32"), row * table_row)
                keys = advance(pointer(key_cache, dtype), head * key_head)
                values = advance(pointer(value_cache, dtype), head * value_head)
                indices = advance(pointer(page_indices, "int32"), row * index_row + head * index_head)
                every = page_indices == 0 or seq_len < min_context
                source = advance(pointer(query, query_dtype), row * query_row + head * group * query_head)
                begin(source, query_head, group, head_size, np.float32(scale_log2), q, weighted, tops, sums)
                pages = pages_to_read(seq_len, page_size, budget, every)
                first, last = pages * chunk // chunks, pages * (chunk + 1) // chunks
                for start in range(first, last, tile_pages):
                    count = min(tile_pages, last - start)
                    for i in range(count):
                        page = page_at(indices, start + i, every)
                        seen = visible_tokens(page, page_size, seq_len)
                        if seen > 0:
                            key = page_start(keys, key_block, table, page, pages_per_block, page_size)
                            value = page_start(
                                values, value_block, table, page, pages_per_block, page_size * head_size
                            )
                            following = page_at(indices, min(start + i + 1, last - 1), every)
                            if visible_tokens(following, page_size, seq_len) == 0:
                                following = page
                            coming = page_start(keys, key_block, table, following, pages_per_block, page_size)
                            for token in range(0, page_size, key_step):
                                tile = zeros(group, token_cols, token_lanes)
                                for channel in range(head_size):
                                    k = advance(key, channel * block_size + token)
                                    tile = multiply_add_outer(tile, advance(q, channel), head_size, k)
                                    # The next page's K and this page's V, which are not needed before.
                                    for part in range(0, page_size if token == 0 else 0, line):
                                        prefetch(advance(coming, channel * block_size + part))
                                        if not skips:
                                            prefetch(advance(value, channel * page_size + part))
                                store(advance(weights, i * page_size + token), tile_tokens, tile)
                        hide(weights, tile_tokens, group, i * page_size + seen, (i + 1) * page_size)
                    tokens = (count * page_size + LANES - 1) // LANES * LANES
                    hide(weights, tile_tokens, group, count * page_size, tokens)
                    raise_tops(weights, tile_tokens, tokens, group, head_size, tops, sums, weighted)
                    if skips:
                        hide_far(weights, tile_tokens, tokens, group, tops, limit, nearness)
                    to_weights(weights, tile_tokens, tokens, group, tops, sums)
                    for channel in range(0, head_size, value_step):
                        tile = load_tile(advance(weighted, channel), head_size, group, channel_cols, LANES)
                        for i in range(count):
                            page = page_at(indices, start + i, every)
                            seen = visible_tokens(page, page_size, seq_len)
                            if seen > 0:
                                value = page_start(
                                    values, value_block, table, page, pages_per_block, page_size * head_size
                                )
                                for token in range(seen):
                                    place = i * page_size + token
                                    if skips and get(nearness, place) <= -limit:
                                        continue
                                    v = advance(value, token * head_size + channel)
                                    tile = multiply_add_outer(tile, advance(weights, place), tile_tokens, v)
                        store(advance(weighted, channel), head_size, tile)
                results = pointer(partial, "float32")
                keep(weighted, tops, sums, group, head_size, advance(results, item * partial_size))
                if next_item(advance(pointer(counter, "int64"), 1 + owner)) == chunks - 1:
                    target = advance(pointer(out, query_dtype), owner * query_size)
                    results = advance(results, owner * chunks * partial_size)
                    merge(results, chunks, group, target, head_size)

    return kernel


def kernel_for_auto(
    query_dtype: str,
    group: int,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    page_size: int,
    skips: bool,
) -> tuple[Callable[..., None], tuple[int, ...]]:
    """The kernel for caches in the model's dtype, and their addresses."""
    dtype = check_caches(key_cache, value_cache)
    block_size, head_size = key_cache.shape[2:]
    if page_size not in PAGE_SIZES or block_size % page_size:
        raise ValueError(
            f"page_size: expected one of {PAGE_SIZES}, a divisor of block size {block_size}, got {page_size}"
        )
    kernel = attend_kernel(dtype, query_dtype, head_size, group, page_size, block_size, skips)
    return kernel, addresses_of(key_cache, value_cache)


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

    Args:
        query: ``[R, Hq, D]`` float32, bfloat16 or float16, each head contiguous.
        key_cache: ``[B, H, N, D]``, channel-major blocks: strides ``(.., .., 1, N)``; or 4-bit codes, in
            channel-major pages.
        value_cache: ``[B, H, N, D]``, token-major blocks: strides ``(.., .., D, 1)``; or 4-bit codes, in
            token-major pages.
        block_table: ``[R, M]`` int32.
        seq_lens: ``[R]`` int32; the last page may be partly filled.
        page_indices: ``[R, H, K]`` int32 page numbers within the row's context, -1 for none. None: every row
            reads every page.
        page_size: Tokens per page.
        scale: Factor of q . k.
        min_context: Rows of fewer tokens read every page, whatever `page_indices` holds.
        value_threshold: t, positive: V rows with less than e^-t of the largest share of the softmax are left
            out (see the reference); None reads every V row.

    Returns:
        ``[R, Hq, D]`` in the query's dtype; computed in float32. A row without any page is 0.
    """
    codes = key_cache.codes if isinstance(key_cache, Int4Keys) else key_cache
    kv_heads, head_size = codes.shape[1], codes.shape[-1]
    query_dtype = check_query(query, kv_heads, head_size)
    rows, num_heads, _ = query.shape
    check_integers("block_table", block_table, torch.int32, rows)
    check_integers("seq_lens", seq_lens, torch.int32, rows)
    budget, listed = page_lists(page_indices, seq_lens[:rows], kv_heads, page_size)
    group, skips = num_heads // kv_heads, value_threshold is not None
    if isinstance(key_cache, Int4Keys) and isinstance(value_cache, Int4Values):
        kernel, caches = kernel_for_int4(query_dtype, group, key_cache, value_cache, page_size, skips)
    else:
        assert isinstance(key_cache, torch.Tensor)
        assert isinstance(value_cache, torch.Tensor)
        kernel, caches = kernel_for_auto(query_dtype, group, key_cache, value_cache, page_size, skips)
    threads = use_torch_threads()
    chunks = chunks_for_balance(max(1, rows * kv_heads), threads, max(1, budget // LEAST_PAGES))
    out = torch.empty((rows, num_heads, head_size), dtype=query.dtype)
    partial = torch.empty(rows * num_heads * chunks * (head_size + 2), dtype=torch.float32)
    counters = np.zeros(1 + rows * kv_heads, np.int64)
    kernel(
        threads, counters.ctypes.data, query.data_ptr(), query.stride(0), query.stride(1), *caches,
        block_table.data_ptr(), block_table.stride(0), seq_lens.data_ptr(), *listed, budget, min_context,
        partial.data_ptr(), out.data_ptr(), rows, kv_heads, chunks, scale * LOG2_E,
        (value_threshold or 0.0) * LOG2_E,
    )  # fmt: skip
    return out
