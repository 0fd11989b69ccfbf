"""The K best pages of every (row, KV head), the first and last always: a threshold search (section 3.3).

Scores become uint32 keys of the same order. The K-th best key is found by cutting an interval of keys in four
and counting the keys above each cut, until exactly K keys lie above or only ties are left; then a prefix sum
places the chosen pages. A long context is cut in chunks: each keeps its own K best, and the program that
finishes last searches among those.
"""

import torch
import triton
import triton.language as tl

from vllm_quest.kernels.triton.launch import CHUNK
from vllm_quest.kernels.triton.split import arrive_last
from vllm_quest.kernels.triton.structs import Budget, PerHead, Scratch
from vllm_quest.kernels.triton.workspace import Workspace, select_scratch

__all__ = ["select_pages"]

KEYS_PER_THREAD = 16

# Keys of scores are 1 to _BEST; 0 is no page, _FORCED a page that is kept whatever the scores.
_BEST = tl.constexpr(0xFFFFFFF0)
_FORCED = tl.constexpr(0xFFFFFFFF)


@triton.jit
def _ordered_keys(page_scores, page, max_pages, end, total, budget):
    """uint32 keys in the order of the scores, for `page` below `end`."""
    # Masked by the buffer's length and not by `end`, of which the compiler knows no alignment: 16-byte loads.
    score = tl.load(page_scores + page, mask=page < max_pages, other=0.0)
    score = tl.where(score == 0.0, 0.0, score)  # -0.0 ties with 0.0
    bits = score.to(tl.uint32, bitcast=True)
    key = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    key = tl.minimum(tl.maximum(key, 1), _BEST)
    forced = (page < budget.sink_pages) | (page >= total - budget.recent_pages)
    return tl.where(page < end, tl.where(forced, _FORCED, key), 0).to(tl.uint32)


@triton.jit
def _cut(low, high):
    """A quarter of [low, high), at least 1."""
    return tl.maximum((high - low) >> 2, 1).to(tl.uint32)


@triton.jit
def _count_above(key, low, step):
    """Which of the cuts low + step, + 2 step, + 3 step a key reaches, in 21 bits each: one sum counts all."""
    first = (key >= low + step).to(tl.int64)
    second = (key >= low + 2 * step).to(tl.int64)
    third = (key >= low + 3 * step).to(tl.int64)
    return first + (second << 21) + (third << 42)


@triton.jit
def _narrow(low, high, at_low, at_high, step, counts, wanted):
    """The quarter of [low, high) where the count falls below `wanted`, and the counts at its ends."""
    reached = ((counts & 0x1FFFFF) >= wanted).to(tl.int32)
    reached += (((counts >> 21) & 0x1FFFFF) >= wanted).to(tl.int32)
    reached += ((counts >> 42) >= wanted).to(tl.int32)
    below = (counts >> (21 * tl.maximum(reached - 1, 0))) & 0x1FFFFF
    above = (counts >> (21 * tl.minimum(reached, 2))) & 0x1FFFFF
    at_low = tl.where(reached > 0, below.to(tl.int32), at_low)
    at_high = tl.where(reached < 3, above.to(tl.int32), at_high)
    low += reached.to(tl.uint32) * step
    high = tl.where(reached < 3, low + step, high)
    return low, high, at_low, at_high


@triton.jit
def _choose(key, low, high, ties, sure_before, ties_before):
    """Keys from `high` on, and the first `ties` of those equal to `low`: chosen or not, and their places."""
    sure = key >= high
    tie = (key == low) & (key < high)
    both = sure.to(tl.int32) + (tie.to(tl.int32) << 16)
    before = tl.cumsum(both, 0) - both
    tie_rank = ties_before + (before >> 16)
    place = sure_before + (before & 0xFFFF) + tl.minimum(tie_rank, ties)
    found = tl.sum(both, 0)
    return (
        sure | (tie & (tie_rank < ties)),
        place,
        sure_before + (found & 0xFFFF),
        ties_before + (found >> 16),
    )


@triton.jit
def _search(key, count, forced, wanted):
    """The interval of keys that ends the search among `key`, of which `count` are pages, and its upper count.

    It begins at the least and the greatest score: most bits are the same in all of them.
    """
    low = tl.min(tl.where(key > 0, key, _BEST), 0)
    high = tl.max(tl.where(key <= _BEST, key, 0), 0) + 1
    at_low, at_high = count, forced
    while (high - low > 1) & (at_low != wanted):
        step = _cut(low, high)
        counts = tl.sum(_count_above(key, low, step), 0)
        low, high, at_low, at_high = _narrow(low, high, at_low, at_high, step, counts, wanted)
    # Where exactly the wanted number reaches `low` there are no ties to divide.
    return low, tl.where(at_low == wanted, low, high), at_high


@triton.jit
def _choose_from_tile(out, keys, pages, count, forced, wanted, TILE: tl.constexpr):
    """As `_choose_from_chunks`, where all candidates fit into one tile."""
    index = tl.arange(0, TILE)
    key = tl.load(keys + index, mask=index < count, other=0).to(tl.uint32)
    page = tl.load(pages + index, mask=index < count, other=0)
    low, high, at_high = _search(key, count, forced, wanted)
    chosen, place, _, _ = _choose(key, low, high, wanted - at_high, 0, 0)
    tl.store(out + place, page, mask=chosen)


@triton.jit
def _choose_from_chunks(out, keys, pages, count, forced, wanted, CHUNK: tl.constexpr):
    """Writes the `wanted` best of the `count` candidates of all chunks, which are in page order."""
    low = tl.full([], 1, tl.uint32)
    high = tl.full([], _FORCED, tl.uint32)
    at_low, at_high = count, forced
    while (high - low > 1) & (at_low != wanted):
        step = _cut(low, high)
        above = tl.zeros([CHUNK], tl.int64)
        for start in range(0, count, CHUNK):
            index = start + tl.arange(0, CHUNK)
            key = tl.load(keys + index, mask=index < count, other=0).to(tl.uint32)
            above += _count_above(key, low, step)
        low, high, at_low, at_high = _narrow(low, high, at_low, at_high, step, tl.sum(above, 0), wanted)
    high = tl.where(at_low == wanted, low, high)
    sure = 0
    ties = 0
    for start in range(0, count, CHUNK):
        index = start + tl.arange(0, CHUNK)
        key = tl.load(keys + index, mask=index < count, other=0).to(tl.uint32)
        page = tl.load(pages + index, mask=index < count, other=0)
        chosen, place, sure, ties = _choose(key, low, high, wanted - at_high, sure, ties)
        tl.store(out + place, page, mask=chosen)


@triton.jit
def _select_kernel(
    page_scores,
    num_pages,
    out,
    scratch,
    max_pages,
    budget,
    CHUNK: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    chunk = tl.program_id(0)
    chunks = tl.num_programs(0)
    kv_head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    total = tl.load(num_pages + row)
    out = out.data + row * out.stride_row + kv_head * out.stride_head
    budget_pages = budget.pages
    if total <= budget_pages:  # nothing to choose, and no score is read
        for start in range(chunk * CHUNK, budget_pages, chunks * CHUNK):
            page = start + tl.arange(0, CHUNK)
            tl.store(out + page, tl.where(page < total, page, -1), mask=page < budget_pages)
        return
    first = chunk * CHUNK
    if first >= total:
        return
    end = tl.minimum(first + CHUNK, total)
    page = first + tl.arange(0, CHUNK)
    scores = page_scores.data + row * page_scores.stride_row + kv_head * page_scores.stride_head
    key = _ordered_keys(scores, page, max_pages, end, total, budget)

    wanted = tl.minimum(budget_pages, end - first)
    forced = tl.maximum(tl.minimum(end, budget.sink_pages) - first, 0)
    forced += tl.maximum(end - tl.maximum(total - budget.recent_pages, first), 0)
    low, high, at_high = _search(key, end - first, forced, wanted)
    chosen, place, _, _ = _choose(key, low, high, wanted - at_high, 0, 0)
    if total <= CHUNK:
        tl.store(out + place, page, mask=chosen)
        return
    kept = tl.minimum(budget_pages, CHUNK)  # all chunks but the last have as many, so that none leaves a gap
    pair = row * tl.num_programs(1) + kv_head
    keys = scratch.data + pair * 2 * chunks * kept
    pages = keys + chunks * kept
    tl.store(keys + chunk * kept + place, key.to(tl.int32), mask=chosen)
    tl.store(pages + chunk * kept + place, page, mask=chosen)
    active = tl.cdiv(total, CHUNK)
    if arrive_last(scratch.arrivals + pair, active):
        count = (active - 1) * kept + tl.minimum(kept, total - (active - 1) * CHUNK)
        forced = budget.sink_pages + budget.recent_pages
        if count <= CHUNK:  # in most rows, whatever the longest context that the model allows
            _choose_from_tile(out, keys, pages, count, forced, budget_pages, min(CANDIDATES, CHUNK))
        elif CANDIDATES <= 2 * CHUNK:
            _choose_from_tile(out, keys, pages, count, forced, budget_pages, CANDIDATES)
        else:
            _choose_from_chunks(out, keys, pages, count, forced, budget_pages, CHUNK)


def _chunk_of(max_pages: int) -> int:
    return min(CHUNK, max(128, triton.next_power_of_2(max_pages)))


def select_pages(
    page_scores: torch.Tensor,
    num_pages: torch.Tensor,
    budget_pages: int,
    sink_pages: int,
    recent_pages: int,
    *,
    out: torch.Tensor | None = None,
    workspace: Workspace | None = None,
) -> torch.Tensor:
    """The pages to read: the first and the last ones always, the best scores in between. One launch.

    Ties go to the earlier page. The first and last pages are kept even against scores of +inf.

    Args:
        page_scores: ``[R, H, pages]`` float32, contiguous in the pages; only those below `num_pages` are
            read.
        num_pages: ``[R]`` int32, pages in the context of each row; read on the device.
        budget_pages: K, at least ``sink_pages + recent_pages``.
        sink_pages: First pages that are always kept.
        recent_pages: Last pages that are always kept.
        out: ``[R, H, K]`` int32, written.
        workspace: Holds at least `select_scratch` elements.

    Returns:
        ``[R, H, K]`` int32, ascending page numbers, then -1 where the context has fewer than K pages.

    Raises:
        ValueError: A shape, stride or count that the kernel does not handle.
    """
    rows, num_kv_heads, max_pages = page_scores.shape
    shape = (rows, num_kv_heads, budget_pages)
    if budget_pages < max(1, sink_pages + recent_pages):
        raise ValueError(f"budget_pages: {budget_pages}; allowed: at least {sink_pages} + {recent_pages}")
    if page_scores.dtype != torch.float32 or page_scores.stride(2) != 1:
        raise ValueError(f"page_scores: {page_scores.dtype}; needed: float32, contiguous in the pages")
    if out is None:
        out = torch.empty(shape, dtype=torch.int32, device=page_scores.device)
    if out.shape != shape or out.dtype != torch.int32 or out.stride(2) != 1:
        raise ValueError(f"out: {tuple(out.shape)} {out.dtype}; needed: {shape} int32, contiguous in K")
    pairs, chunk = rows * num_kv_heads, _chunk_of(max_pages)
    needed = select_scratch(pairs, max_pages, budget_pages)
    scratch, arrivals = out, num_pages  # not touched where one program sees all pages
    if needed:
        if workspace is None:
            workspace = Workspace.allocate(needed, pairs, page_scores.device)
        workspace.check(needed, pairs)
        scratch, arrivals = workspace.scratch.view(torch.int32), workspace.arrivals
    chunks = triton.cdiv(max_pages, chunk)
    _select_kernel[(chunks, num_kv_heads, rows)](
        PerHead.of(page_scores),
        num_pages,
        PerHead.of(out),
        Scratch(scratch, arrivals),
        max_pages,
        Budget(budget_pages, sink_pages, recent_pages),
        CHUNK=chunk,
        CANDIDATES=triton.next_power_of_2(chunks * min(budget_pages, chunk)),
        num_warps=max(1, min(8, chunk // (32 * KEYS_PER_THREAD))),
    )
    return out
