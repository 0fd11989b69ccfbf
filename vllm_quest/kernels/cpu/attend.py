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

from vllm_quest.kernels.cpu.launch import (
    INSTRUCTIONS,
    KERNEL_OPTIONS,
    check_floating,
    check_key_cache,
    check_rows,
    chunks_for_balance,
    require,
    use_torch_threads,
)
from vllm_quest.kernels.cpu.memory import advance, get, load, load_tile, next_item, pointer, put, stack, store
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

__all__ = ["attend_pages"]

LANES = 16
REGISTERS = 24  # of 32, for the tile that a loop accumulates
TILE_TOKENS = 64  # tokens between two updates of the running maximum
LEAST_PAGES = 8  # of one chunk, where a row's pages are cut into chunks
LOG2_E = math.log2(math.e)


def largest_divisor(number: int, limit: int) -> int:
    return max(d for d in range(1, max(1, limit) + 1) if number % d == 0)


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

    @njit(**KERNEL_OPTIONS)
    def kernel(
        threads, counter, query, query_row, query_head, key_cache, key_block, key_head, value_cache,
        value_block, value_head, block_table, table_row, seq_lens, page_indices, index_row, index_head,
        budget, partial, out, rows, kv_heads, chunks, scale_log2,
    ):  # fmt: skip
        build  # noqa: B018
        for _ in prange(threads):
            q, sums_v = stack("float32", query_size), stack("float32", query_size)
            weights = stack("float32", weights_size)
            tops, sums = stack("float32", group), stack("float32", group)
            blocks, pages = stack("int64", tile_pages), stack("int64", tile_pages)
            nothing, never = np.float32(0), np.float32(-np.inf)
            while True:
                item = next_item(pointer(counter, "int64"))
                owner, chunk = item // chunks, item % chunks
                row, head = owner // kv_heads, owner % kv_heads
                if row >= rows:
                    break
                seq_len = get(pointer(seq_lens, "int32"), row)
                for g in range(group):
                    put(tops, g, never)
                    put(sums, g, nothing)
                    source = row * query_row + (head * group + g) * query_head
                    for channel in range(0, head_size, LANES):
                        values = load(advance(pointer(query, query_dtype), source + channel), LANES)
                        scaled = multiply(values, splat(np.float32(scale_log2), LANES))
                        store(advance(q, g * head_size + channel), 0, scaled)
                        store(advance(sums_v, g * head_size + channel), 0, splat(nothing, LANES))
                indices = advance(pointer(page_indices, "int32"), row * index_row + head * index_head)
                following, last = budget * chunk // chunks, budget * (chunk + 1) // chunks
                while following < last:
                    # A tile: up to `tile_pages` pages with at least one token of the context.
                    gathered = 0
                    while following < last and gathered < tile_pages:
                        page = get(indices, following)
                        following += 1
                        if page >= 0 and page * page_size < seq_len:
                            block = get(
                                pointer(block_table, "int32"), row * table_row + page // pages_per_block
                            )
                            put(blocks, gathered, block)
                            put(pages, gathered, page)
                            gathered += 1
                    # Logits, in units of log2(e).
                    for i in range(gathered):
                        page = get(pages, i)
                        place = (
                            get(blocks, i) * key_block + head * key_head + page % pages_per_block * page_size
                        )
                        key = advance(pointer(key_cache, dtype), place)
                        for token in range(0, page_size, key_step):
                            tile = zeros(group, token_cols, token_lanes)
                            for channel in range(head_size):
                                k = advance(key, channel * block_size + token)
                                tile = multiply_add_outer(tile, advance(q, channel), head_size, k)
                            store(advance(weights, i * page_size + token), tile_tokens, tile)
                        # What lies behind the context's last token was never written.
                        for token in range(max(0, seq_len - page * page_size), page_size):
                            for g in range(group):
                                put(weights, g * tile_tokens + i * page_size + token, never)
                    width = gathered * page_size
                    for g in range(group if gathered else 0):
                        logits = advance(weights, g * tile_tokens)
                        highest = splat(get(tops, g), token_lanes)
                        for token in range(0, width, token_lanes):
                            highest = maximum(highest, load(advance(logits, token), token_lanes))
                        top = max_lane(highest)
                        if top > get(tops, g):
                            rescale = exp2(splat(get(tops, g) - top, LANES))
                            put(tops, g, top)
                            put(sums, g, get(sums, g) * max_lane(rescale))
                            for channel in range(0, head_size, LANES):
                                place = advance(sums_v, g * head_size + channel)
                                store(place, 0, multiply(load(place, LANES), rescale))
                        total = zeros(1, 1, token_lanes)
                        for token in range(0, width, token_lanes):
                            logit = load(advance(logits, token), token_lanes)
                            weight = exp2(subtract(logit, splat(top, token_lanes)))
                            store(advance(logits, token), 0, weight)
                            total = add(total, weight)
                        put(sums, g, get(sums, g) + sum_tile(total))
                    for channel in range(0, head_size, value_step):
                        tile = load_tile(advance(sums_v, channel), head_size, group, channel_cols, LANES)
                        for i in range(gathered):
                            page = get(pages, i)
                            token = page % pages_per_block * page_size
                            place = get(blocks, i) * value_block + head * value_head + token * head_size
                            value = advance(pointer(value_cache, dtype), place + channel)
                            for token in range(min(page_size, seq_len - page * page_size)):
                                weight = advance(weights, i * page_size + token)
                                v = advance(value, token * head_size)
                                tile = multiply_add_outer(tile, weight, tile_tokens, v)
                        store(advance(sums_v, channel), head_size, tile)
                for g in range(group):
                    place = (item * group + g) * partial_size
                    for channel in range(0, head_size, LANES):
                        values = load(advance(sums_v, g * head_size + channel), LANES)
                        store(advance(pointer(partial, "float32"), place + channel), 0, values)
                    put(pointer(partial, "float32"), place + head_size, get(tops, g))
                    put(pointer(partial, "float32"), place + head_size + 1, get(sums, g))
                if next_item(advance(pointer(counter, "int64"), 1 + owner)) == chunks - 1:
                    for g in range(group):
                        parts = advance(
                            pointer(partial, "float32"), (owner * chunks * group + g) * partial_size
                        )
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
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
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
    query_dtype, dtype = check_floating("query", query, 3), check_key_cache(key_cache, value_cache)
    rows, num_heads, head_size = query.shape
    kv_heads, block_size = key_cache.shape[1:3]
    budget = page_indices.shape[-1]
    check_rows("block_table", block_table, torch.int32, rows)
    check_rows("seq_lens", seq_lens, torch.int32, rows)
    check_rows("page_indices", page_indices, torch.int32, rows)
    require(head_size == key_cache.shape[3], "query", f"head size {head_size} is not the cache's")
    require(query.stride(2) == 1, "query", f"expected contiguous heads, got strides {query.stride()}")
    require(num_heads % kv_heads == 0, "query", f"{num_heads} heads are no multiple of {kv_heads} KV heads")
    require(
        page_indices.dim() == 3 and page_indices.shape[1] == kv_heads,
        "page_indices",
        f"expected [{rows}, {kv_heads}, K], got {tuple(page_indices.shape)}",
    )
    require(
        page_size % 8 == 0 and page_size.bit_count() == 1 and block_size % page_size == 0,
        "page_size",
        f"expected 8, 16, 32 or 64 and a divisor of the block size {block_size}, got {page_size}",
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
