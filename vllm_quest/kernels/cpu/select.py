"""`select_pages`, compiled: bisects the bits of the threshold score, then emits the pages that reach it."""

from __future__ import annotations

from functools import cache

import torch
from numba import njit, prange

from vllm_quest.kernels.cpu.launch import (
    INSTRUCTIONS,
    KERNEL_OPTIONS,
    check_floating,
    check_integers,
    new_counter,
    use_torch_threads,
)
from vllm_quest.kernels.cpu.memory import advance, get, load, load_tile, next_item, pointer, put
from vllm_quest.kernels.cpu.simd import add, at_least, float_of_bits, sum_tile, zeros

__all__ = ["select_pages"]

NO_PAGE = -1
INFINITY_BITS = 0x7F800000
LANES, UNROLL = 16, 4


@njit(error_model="numpy")
def float_of_rank(rank):
    """The floats in ascending order, numbered from 0.0, which is also -0.0."""
    return float_of_bits(rank if rank >= 0 else (1 << 31) - rank)


@njit(error_model="numpy")
def count_at_least(scores, count, threshold):
    """How many of the scores reach the threshold."""
    whole = count - count % (LANES * UNROLL)
    reached = zeros(1, UNROLL, LANES)
    for i in range(0, whole, LANES * UNROLL):
        reached = add(reached, at_least(load_tile(advance(scores, i), 0, 1, UNROLL, LANES), threshold))
    rest = zeros(1, 1, LANES)
    vectors = count - count % LANES
    for i in range(whole, vectors, LANES):
        rest = add(rest, at_least(load(advance(scores, i), LANES), threshold))
    total = int(sum_tile(reached)) + int(sum_tile(rest))
    for i in range(vectors, count):
        total += get(scores, i) >= threshold
    return total


@cache
def select_kernel():
    build = INSTRUCTIONS

    @njit(**KERNEL_OPTIONS)
    def kernel(
        threads,
        counter,
        page_scores,
        score_row,
        score_head,
        num_pages,
        out,
        rows,
        kv_heads,
        budget,
        sink,
        recent,
    ):
        build  # noqa: B018
        for _ in prange(threads):
            while True:
                item = next_item(pointer(counter, "int64"))
                if item >= rows * kv_heads:
                    break
                row, head = item // kv_heads, item % kv_heads
                pages = get(pointer(num_pages, "int32"), row)
                selected = advance(pointer(out, "int32"), item * budget)
                if pages <= budget:
                    for place in range(budget):
                        put(selected, place, place if place < pages else NO_PAGE)
                    continue
                # The pages between the always kept ones compete for what is left of the budget.
                wanted, competing = budget - sink - recent, pages - sink - recent
                start = row * score_row + head * score_head + sink
                scores = advance(pointer(page_scores, "float32"), start)
                # The threshold is the largest score that at least `wanted` pages reach.
                low, high = -INFINITY_BITS, INFINITY_BITS
                while low < high:
                    middle = (low + high + 1) // 2
                    reached = count_at_least(scores, competing, float_of_rank(middle))
                    if reached < wanted:
                        high = middle - 1
                    else:
                        low = middle
                        if reached == wanted:
                            break
                threshold, above = float_of_rank(low), float_of_rank(low + 1)
                ties = wanted - count_at_least(scores, competing, above)
                for page in range(sink):
                    put(selected, page, page)
                place, end = sink, sink + wanted
                for page in range(competing):
                    if place == end:
                        break
                    score = get(scores, page)
                    # Written always and kept where the place moves on: a branch would be mispredicted.
                    put(selected, place, sink + page)
                    is_tie = score == threshold and ties > 0
                    ties -= is_tie
                    place += is_tie or score > threshold
                for page in range(place, end):  # scores that are NaN
                    put(selected, page, NO_PAGE)
                for page in range(recent):
                    put(selected, end + page, pages - recent + page)

    return kernel


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
    check_floating("page_scores", page_scores, 3)
    rows, kv_heads, _ = page_scores.shape
    if page_scores.dtype != torch.float32 or page_scores.stride(2) != 1:
        raise ValueError(
            f"page_scores: expected float32 with contiguous pages, got {page_scores.dtype} with strides "
            f"{page_scores.stride()}"
        )
    if min(sink_pages, recent_pages) < 0 or budget_pages < max(1, sink_pages + recent_pages):
        raise ValueError(
            f"budget_pages: expected at least sink_pages + recent_pages, got {budget_pages} with "
            f"{sink_pages} + {recent_pages}"
        )
    check_integers("num_pages", num_pages, torch.int32, rows)
    page_indices = torch.empty((rows, kv_heads, budget_pages), dtype=torch.int32)
    counter = new_counter()
    select_kernel()(
        use_torch_threads(), counter.ctypes.data, page_scores.data_ptr(), page_scores.stride(0),
        page_scores.stride(1), num_pages.data_ptr(), page_indices.data_ptr(), rows, kv_heads, budget_pages,
        sink_pages, recent_pages,
    )  # fmt: skip
    return page_indices
