"""`score_pages`, compiled: reads each page's bounds where they lie, once for all query heads of a KV head."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from numba import njit, prange

from vllm_quest.config import GROUP_REDUCES
from vllm_quest.kernels.bounds import PageBounds
from vllm_quest.kernels.cpu.elements import SIZE
from vllm_quest.kernels.cpu.launch import (
    CACHE_LINE,
    INSTRUCTIONS,
    KERNEL_OPTIONS,
    bound_addresses,
    check_bounds,
    check_integers,
    check_query,
    new_counter,
    use_torch_threads,
)
from vllm_quest.kernels.cpu.memory import (
    advance,
    get,
    load,
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
    minimum,
    multiply,
    multiply_add_rows,
    put_row_sums,
    splat,
    subtract,
    sum_tile,
    zeros,
)

__all__ = ["score_pages"]

LANES = 16
SOON, LATER = 8, 32  # pages ahead that are prefetched
CHUNK_PAGES = 128  # what one thread takes at a time
LOG2_E = math.log2(math.e)


@cache
def score_kernel(dtype: str, query_dtype: str, head_size: int, group: int, pages_per_block: int, reduce: str):
    """The kernel of one configuration; `group` query heads share a KV head."""
    build = INSTRUCTIONS
    query_size = group * head_size
    line = CACHE_LINE // SIZE[dtype]
    coded = dtype == "uint8"
    by_head = reduce == "softmax_mean"
    take_mean = reduce == "mean"

    @njit(**KERNEL_OPTIONS)
    def kernel(
        threads, counter, query, query_row, query_head, bounds, bounds_block, bounds_head, params,
        params_block, params_head, block_table, table_row, num_pages, out, width, rows, kv_heads, chunks,
        chunk_blocks,
    ):  # fmt: skip
        build  # noqa: B018
        for _ in prange(threads):
            positive, negative = stack("float32", query_size), stack("float32", query_size)
            sums, query_sums = stack("float32", group), stack("float32", group)
            while True:
                item = next_item(pointer(counter, "int64"))
                row, head, chunk = item // (kv_heads * chunks), item // chunks % kv_heads, item % chunks
                if row >= rows:
                    break
                pages = get(pointer(num_pages, "int32"), row)
                first_page = chunk * chunk_blocks * pages_per_block
                if first_page >= pages:
                    continue
                # max(q * kmin, q * kmax) is q * kmax where q > 0 and q * kmin where q < 0.
                for g in range(group):
                    source = row * query_row + (head * group + g) * query_head
                    nothing = splat(np.float32(0), LANES)
                    total = nothing
                    for channel in range(0, head_size, LANES):
                        q = load(advance(pointer(query, query_dtype), source + channel), LANES)
                        total = add(total, q)
                        store(advance(positive, g * head_size + channel), 0, maximum(q, nothing))
                        store(advance(negative, g * head_size + channel), 0, minimum(q, nothing))
                    put(query_sums, g, sum_tile(total))
                scores = advance(pointer(out, "float32"), (row * kv_heads + head) * width)
                for page in range(first_page, min(pages, first_page + chunk_blocks * pages_per_block)):
                    table = advance(pointer(block_table, "int32"), row * table_row)
                    base = advance(pointer(bounds, dtype), head * bounds_head)
                    kmin = page_start(base, bounds_block, table, page, pages_per_block, 2 * head_size)
                    soon = min(page + SOON, pages - 1)
                    later = min(page + LATER, pages - 1)
                    coming = page_start(base, bounds_block, table, soon, pages_per_block, 2 * head_size)
                    # The first line alone, far ahead: random blocks miss the TLB, and that takes longest.
                    prefetch(page_start(base, bounds_block, table, later, pages_per_block, 2 * head_size))
                    kmax = advance(kmin, head_size)
                    tile = zeros(group, 1, LANES)
                    for channel in range(0, head_size, LANES):
                        if channel % line == 0:
                            prefetch(advance(coming, channel))
                            prefetch(advance(coming, head_size + channel))
                        low, high = load(advance(kmin, channel), LANES), load(advance(kmax, channel), LANES)
                        tile = multiply_add_rows(tile, advance(negative, channel), head_size, low)
                        tile = multiply_add_rows(tile, advance(positive, channel), head_size, high)
                    put_row_sums(sums, tile)
                    if coded:  # A bound is a + s * code: its product with q is a * sum(q) + s * (q . code).
                        base = advance(pointer(params, "float32"), head * params_head)
                        pair = page_start(base, params_block, table, page, pages_per_block, 2)
                        for g in range(group):
                            put(sums, g, get(pair, 0) * get(query_sums, g) + get(pair, 1) * get(sums, g))
                    if by_head:
                        for g in range(group):
                            place = ((row * kv_heads + head) * group + g) * width + page
                            put(pointer(out, "float32"), place, get(sums, g))
                        continue
                    score = get(sums, 0)
                    for g in range(1, group):
                        score = score + get(sums, g) if take_mean else max(score, get(sums, g))
                    put(scores, page, score / np.float32(group) if take_mean else score)

    return kernel


@cache
def softmax_mean_kernel(group: int):
    """Turns scores of query heads, ``[R, Hq, width]``, into scores of KV heads, ``[R, H, pages]``."""
    build = INSTRUCTIONS

    @njit(**KERNEL_OPTIONS)
    def kernel(threads, counter, by_head, width, num_pages, out, out_width, rows, kv_heads, scale_log2):
        build  # noqa: B018
        for _ in prange(threads):
            while True:
                item = next_item(pointer(counter, "int64"))
                if item >= rows * kv_heads:
                    break
                pages = get(pointer(num_pages, "int32"), item // kv_heads)
                scores = advance(pointer(out, "float32"), item * out_width)
                scale = splat(np.float32(scale_log2), LANES)
                for g in range(group):
                    logits = advance(pointer(by_head, "float32"), (item * group + g) * width)
                    # Both scratch rows end at a whole number of vectors; what is beyond the pages is -inf.
                    top = splat(np.float32(-np.inf), LANES)
                    for page in range(0, pages, LANES):
                        top = maximum(top, multiply(load(advance(logits, page), LANES), scale))
                    top = splat(max_lane(top), LANES)
                    total = splat(np.float32(0), LANES)
                    for page in range(0, pages, LANES):
                        power = exp2(subtract(multiply(load(advance(logits, page), LANES), scale), top))
                        store(advance(logits, page), 0, power)
                        total = add(total, power)
                    share = np.float32(1) / (sum_tile(total) * np.float32(group))
                    for page in range(pages):
                        before = get(scores, page) if g else np.float32(0)
                        put(scores, page, before + get(logits, page) * share)

    return kernel


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
        query: ``[R, Hq, D]`` float32, bfloat16 or float16; query head h reads KV head ``h // (Hq / H)``.
        summary: kmin and kmax of each page, each ``[P, 2, D]`` contiguous, in any dtype or as codes.
        block_table: ``[R, M]`` int32, the row's blocks in order.
        num_pages: ``[R]`` int32, pages in the context of each row, at most ``M * P``.
        scale: What attention multiplies q . k with; matters to ``softmax_mean`` only.
        group_reduce: ``max``, ``mean`` or ``softmax_mean`` over the query heads of a KV head.

    Returns:
        ``[R, H, M * P]`` float32; -inf where the row has no such page.
    """
    rows, num_heads, head_size = query.shape
    values = summary.values
    dtype, query_dtype = check_bounds(summary, head_size), check_query(query, values.shape[1], head_size)
    kv_heads, pages_per_block = values.shape[1:3]
    check_integers("block_table", block_table, torch.int32, rows)
    check_integers("num_pages", num_pages, torch.int32, rows)
    if group_reduce not in GROUP_REDUCES:
        raise ValueError(f"group_reduce: expected one of {', '.join(GROUP_REDUCES)}, got {group_reduce!r}")
    group, pages = num_heads // kv_heads, block_table.shape[1] * pages_per_block
    kernel = score_kernel(dtype, query_dtype, head_size, group, pages_per_block, group_reduce)
    scores = torch.full((rows, kv_heads, pages), -torch.inf, dtype=torch.float32)
    target = scores
    if group_reduce == "softmax_mean":
        target = torch.full((rows, num_heads, -(-pages // LANES) * LANES), -torch.inf, dtype=torch.float32)
    threads, counter = use_torch_threads(), new_counter()
    chunk_blocks = max(1, CHUNK_PAGES // pages_per_block)
    kernel(
        threads, counter.ctypes.data, query.data_ptr(), query.stride(0), query.stride(1),
        *bound_addresses(summary), block_table.data_ptr(), block_table.stride(0), num_pages.data_ptr(),
        target.data_ptr(), target.shape[2], rows, kv_heads,
        max(1, -(-block_table.shape[1] // chunk_blocks)), chunk_blocks,
    )  # fmt: skip
    if group_reduce == "softmax_mean":
        counter = new_counter()
        softmax_mean_kernel(group)(
            threads, counter.ctypes.data, target.data_ptr(), target.shape[2], num_pages.data_ptr(),
            scores.data_ptr(), pages, rows, kv_heads, scale * LOG2_E,
        )  # fmt: skip
    return scores
