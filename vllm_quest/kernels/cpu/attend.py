"""`attend_pages`, compiled: attention over the selected pages with an online softmax in float32.

The query heads of a KV head are processed together, so each K and V element is loaded once. K is
channel-major: a vector holds one channel of consecutive tokens, and logits need no sum across lanes.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from numba import njit, prange

from vllm_quest.config import PAGE_SIZES
from vllm_quest.kernels.cpu.elements import SIZE
from vllm_quest.kernels.cpu.launch import (
    CACHE_LINE,
    INSTRUCTIONS,
    KERNEL_OPTIONS,
    check_caches,
    check_integers,
    check_query,
    chunks_for_balance,
    use_torch_threads,
)
from vllm_quest.kernels.cpu.memory import (
    advance,
    get,
    load,
    load_tile,
    next_item,
    page_start,
    pointer,
    prefetch,
    put,
    stack,
    store,
)
from vllm_quest.kernels.cpu.simd import (
    add,
    exp2,
    max_lane,
    maximum,
    multiply,
    multiply_add_outer,
    splat,
    subtract,
    sum_tile,
    zeros,
)
from vllm_quest.layout import KeyCache, ValueCache

__all__ = ["attend_pages"]

LANES = 16
REGISTERS = 24  # of 32, for the tile that a loop accumulates
TILE_TOKENS = 64  # tokens between two updates of the running maximum
LEAST_PAGES = 8  # of one chunk, where a row's pages are cut into chunks
LOG2_E = math.log2(math.e)


def largest_divisor(number: int, limit: int) -> int:
    return max(d for d in range(1, max(1, limit) + 1) if number % d == 0)


@njit(error_model="numpy")
def visible_tokens(page, page_size, seq_len):
    """How many tokens of the context a page holds; 0 where the list names no page."""
    return max(0, min(page_size, seq_len - page * page_size)) if page >= 0 else 0


@njit(error_model="numpy")
def scaled(source, target, head_size, factor):
    """Writes the vector at `source`, multiplied by `factor`, to `target`."""
    for channel in range(0, head_size, LANES):
        values = multiply(load(advance(source, channel), LANES), splat(factor, LANES))
        store(advance(target, channel), 0, values)


@cache
def attend_kernel(dtype: str, query_dtype: str, head_size: int, group: int, page_size: int, block_size: int):
    """The kernel of one configuration; `group` query heads share a KV head.

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
    partial_size = head_size + 2
    line = CACHE_LINE // SIZE[dtype]

    @njit(**KERNEL_OPTIONS)
    def kernel(
        threads, counter, query, query_row, query_head, key_cache, key_block, key_head, value_cache,
        value_block, value_head, block_table, table_row, seq_lens, page_indices, index_row, index_head,
        budget, partial, out, rows, kv_heads, chunks, scale_log2,
    ):  # fmt: skip
        build  # noqa: B018
        for _ in prange(threads):
            q, weighted = stack("float32", query_size), stack("float32", query_size)
            tops, sums = stack("float32", group), stack("float32", group)
            weights = stack("float32", weights_size)
            never = np.float32(-np.inf)
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
                for g in range(group):
                    put(tops, g, never)
                    put(sums, g, np.float32(0))
                    source = row * query_row + (head * group + g) * query_head
                    head_query = advance(pointer(query, query_dtype), source)
                    scaled(head_query, advance(q, g * head_size), head_size, np.float32(scale_log2))
                    for channel in range(0, head_size, LANES):
                        store(advance(weighted, g * head_size + channel), 0, zeros(1, 1, LANES))
                first, last = budget * chunk // chunks, budget * (chunk + 1) // chunks
                for start in range(first, last, tile_pages):
                    count = min(tile_pages, last - start)
                    for i in range(count):
                        page = get(indices, start + i)
                        seen = visible_tokens(page, page_size, seq_len)
                        if seen > 0:
                            key = page_start(keys, key_block, table, page, pages_per_block, page_size)
                            value = page_start(
                                values, value_block, table, page, pages_per_block, page_size * head_size
                            )
                            following = get(indices, min(start + i + 1, last - 1))
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
                                        prefetch(advance(value, channel * page_size + part))
                                store(advance(weights, i * page_size + token), tile_tokens, tile)
                        for token in range(seen, page_size):
                            for g in range(group):
                                put(weights, g * tile_tokens + i * page_size + token, never)
                    for g in range(group):
                        logits = advance(weights, g * tile_tokens)
                        highest = splat(get(tops, g), token_lanes)
                        for token in range(0, count * page_size, token_lanes):
                            highest = maximum(highest, load(advance(logits, token), token_lanes))
                        top = max_lane(highest)
                        if top > get(tops, g):
                            shrink = max_lane(exp2(splat(get(tops, g) - top, LANES)))
                            put(tops, g, top)
                            put(sums, g, get(sums, g) * shrink)
                            head_out = advance(weighted, g * head_size)
                            scaled(head_out, head_out, head_size, shrink)
                        total = zeros(1, 1, token_lanes)
                        for token in range(0, count * page_size, token_lanes):
                            logit = load(advance(logits, token), token_lanes)
                            weight = exp2(subtract(logit, splat(top, token_lanes)))
                            store(advance(logits, token), 0, weight)
                            total = add(total, weight)
                        put(sums, g, get(sums, g) + sum_tile(total))
                    for channel in range(0, head_size, value_step):
                        tile = load_tile(advance(weighted, channel), head_size, group, channel_cols, LANES)
                        for i in range(count):
                            page = get(indices, start + i)
                            seen = visible_tokens(page, page_size, seq_len)
                            if seen > 0:
                                value = page_start(
                                    values, value_block, table, page, pages_per_block, page_size * head_size
                                )
                                for token in range(seen):
                                    weight = advance(weights, i * page_size + token)
                                    v = advance(value, token * head_size + channel)
                                    tile = multiply_add_outer(tile, weight, tile_tokens, v)
                        store(advance(weighted, channel), head_size, tile)
                for g in range(group):
                    part = advance(pointer(partial, "float32"), (item * group + g) * partial_size)
                    scaled(advance(weighted, g * head_size), part, head_size, np.float32(1))
                    put(part, head_size, get(tops, g))
                    put(part, head_size + 1, get(sums, g))
                if next_item(advance(pointer(counter, "int64"), 1 + owner)) == chunks - 1:
                    for g in range(group):
                        place = (owner * chunks * group + g) * partial_size
                        parts = advance(pointer(partial, "float32"), place)
                        target = advance(pointer(out, query_dtype), (owner * group + g) * head_size)
                        merge(parts, group * partial_size, chunks, target, head_size)

    return kernel


@njit(error_model="numpy")
def merge(parts, stride, chunks, target, head_size):
    """Writes one query head's output from its chunks' results, `stride` apart; 0 if they saw no token."""
    top = np.float32(-np.inf)
    for chunk in range(chunks):
        top = max(top, get(parts, chunk * stride + head_size))
    total = np.float32(0)
    for chunk in range(chunks):
        part = advance(parts, chunk * stride)
        total += max_lane(exp2(splat(get(part, head_size) - top, LANES))) * get(part, head_size + 1)
    share = splat(np.float32(1) / total if total > 0 else np.float32(0), LANES)
    for channel in range(0, head_size, LANES):
        value = zeros(1, 1, LANES)
        for chunk in range(chunks):
            part = advance(parts, chunk * stride)
            weight = exp2(splat(get(part, head_size) - top, LANES))
            value = add(value, multiply(weight, load(advance(part, channel), LANES)))
        store(advance(target, channel), 0, multiply(value, share))


def attend_pages(
    query: torch.Tensor,
    key_cache: KeyCache,
    value_cache: ValueCache,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    page_indices: torch.Tensor,
    page_size: int,
    scale: float,
) -> torch.Tensor:
    """Attention over the tokens of the selected pages only (section 3.3, "approximate attention").

    Args:
        query: ``[R, Hq, D]`` float32, bfloat16 or float16, each head contiguous.
        key_cache: ``[B, H, N, D]``, channel-major blocks: strides ``(.., .., 1, N)``.
        value_cache: ``[B, H, N, D]``, token-major blocks: strides ``(.., .., D, 1)``.
        block_table: ``[R, M]`` int32.
        seq_lens: ``[R]`` int32; the last page may be partly filled.
        page_indices: ``[R, H, K]`` int32 page numbers within the row's context, -1 for none.
        page_size: Tokens per page.
        scale: Factor of q . k.

    Returns:
        ``[R, Hq, D]`` in the query's dtype; computed in float32. A row without any page is 0.
    """
    assert isinstance(key_cache, torch.Tensor)
    assert isinstance(value_cache, torch.Tensor)
    dtype = check_caches(key_cache, value_cache)
    _, kv_heads, block_size, head_size = key_cache.shape
    query_dtype = check_query(query, kv_heads, head_size)
    rows, num_heads, _ = query.shape
    check_integers("block_table", block_table, torch.int32, rows)
    check_integers("seq_lens", seq_lens, torch.int32, rows)
    check_integers("page_indices", page_indices, torch.int32, rows)
    budget = page_indices.shape[-1]
    if page_indices.shape[1:] != (kv_heads, budget):
        raise ValueError(f"page_indices: expected [{rows}, {kv_heads}, K], got {tuple(page_indices.shape)}")
    if page_size not in PAGE_SIZES or block_size % page_size:
        raise ValueError(
            f"page_size: expected one of {PAGE_SIZES}, a divisor of block size {block_size}, got {page_size}"
        )
    group = num_heads // kv_heads
    kernel = attend_kernel(dtype, query_dtype, head_size, group, page_size, block_size)
    threads = use_torch_threads()
    chunks = chunks_for_balance(max(1, rows * kv_heads), threads, max(1, budget // LEAST_PAGES))
    out = torch.empty((rows, num_heads, head_size), dtype=query.dtype)
    partial = torch.empty(rows * num_heads * chunks * (head_size + 2), dtype=torch.float32)
    counters = np.zeros(1 + rows * kv_heads, np.int64)
    kernel(
        threads, counters.ctypes.data, query.data_ptr(), query.stride(0), query.stride(1),
        key_cache.data_ptr(), key_cache.stride(0), key_cache.stride(1),
        value_cache.data_ptr(), value_cache.stride(0), value_cache.stride(1),
        block_table.data_ptr(), block_table.stride(0), seq_lens.data_ptr(),
        page_indices.data_ptr(), page_indices.stride(0), page_indices.stride(1), budget,
        partial.data_ptr(), out.data_ptr(), rows, kv_heads, chunks, scale * LOG2_E,
    )  # fmt: skip
    return out
