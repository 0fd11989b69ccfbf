"""Attention over K and V in the model's dtype, compiled: an online softmax in float32 over selected pages.

The query heads of a KV head are processed together, so each K and V element is loaded once. K is
channel-major: a vector holds one channel of consecutive tokens, and logits need no sum across lanes.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numba import njit, prange

from vllm_quest.config import PAGE_SIZES
from vllm_quest.formats.auto import AutoCache
from vllm_quest.formats.auto.reference import store as store_tokens
from vllm_quest.kernels.cpu.attend import attend
from vllm_quest.kernels.cpu.elements import SIZE
from vllm_quest.kernels.cpu.launch import (
    CACHE_LINE,
    INSTRUCTIONS,
    KERNEL_OPTIONS,
    REGISTERS,
    TILE_TOKENS,
    addresses_of,
    check_caches,
    largest_divisor,
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
)
from vllm_quest.kernels.cpu.memory import store as store_tile
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

__all__ = ["attend_pages", "store"]

LANES = 16


store = store_tokens  # scattered by torch; scorers that look at K have a compiled store of both


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
        budget, sparse_context, partial, out, rows, kv_heads, chunks, scale_log2, farthest,
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
                every = page_indices == 0 or seq_len < sparse_context
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
                                store_tile(advance(weights, i * page_size + token), tile_tokens, tile)
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
                        store_tile(advance(weighted, channel), head_size, tile)
                results = pointer(partial, "float32")
                keep(weighted, tops, sums, group, head_size, advance(results, item * partial_size))
                if next_item(advance(pointer(counter, "int64"), 1 + owner)) == chunks - 1:
                    target = advance(pointer(out, query_dtype), owner * query_size)
                    results = advance(results, owner * chunks * partial_size)
                    merge(results, chunks, group, target, head_size)

    return kernel


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
    """Attention over the tokens of the selected pages only (section 3.3, "approximate attention").

    Args:
        query: ``[R, Hq, D]`` float32, bfloat16 or float16, each head contiguous.
        cache: K and V, ``[B, H, N, D]`` each; K in channel-major blocks, strides ``(.., .., 1, N)``, V in
            token-major ones, strides ``(.., .., D, 1)``.
        block_table: As for `kernels.cpu.attend.attend`, and so are the others.
        seq_lens: Likewise.
        page_indices: Likewise.
        page_size: Likewise.
        scale: Likewise.
        sparse_context: Likewise.
        value_threshold: Likewise.
        out: Likewise.

    Returns:
        ``[R, Hq, D]`` in the query's dtype; computed in float32. A row without any page is 0.
    """
    key_cache, value_cache = cache
    dtype = check_caches(key_cache, value_cache)
    _, kv_heads, block_size, head_size = key_cache.shape
    if page_size not in PAGE_SIZES or block_size % page_size:
        raise ValueError(
            f"page_size: expected one of {PAGE_SIZES}, a divisor of block size {block_size}, got {page_size}"
        )
    return attend(
        lambda query_dtype, group, skips: attend_kernel(
            dtype, query_dtype, head_size, group, page_size, block_size, skips
        ),
        addresses_of(key_cache, value_cache),
        query,
        kv_heads,
        head_size,
        block_table,
        seq_lens,
        page_indices,
        page_size,
        scale,
        sparse_context=sparse_context,
        value_threshold=value_threshold,
        out=out,
    )
