"""Scores every page of every (row, KV head): an upper bound of q . k over the page's keys (equation 2).

max(q * kmin, q * kmax) is q * kmin where q is negative and q * kmax elsewhere. So the bound is a dot product,

    sum_i max(q_i * kmin_i, q_i * kmax_i) = [min(q, 0) | max(q, 0)] . [kmin | kmax]

and runs on tensor cores, on the bounds as they lie in the cache. The query heads of a KV head share one read.
"""

import math

import torch
import triton
import triton.language as tl

from vllm_quest.kernels.bounds import PageBounds
from vllm_quest.kernels.triton.codes import power_of_two
from vllm_quest.kernels.triton.launch import (
    check_bounds,
    check_group,
    choose,
    dot_type,
    split_count,
    split_total,
    takes_ptx,
)
from vllm_quest.kernels.triton.lookup import spread
from vllm_quest.kernels.triton.split import arrive_last, split_range
from vllm_quest.kernels.triton.structs import (
    DOT_ROWS,
    Bounds,
    Contexts,
    Group,
    PerHead,
    ScoreShape,
    Scratch,
)
from vllm_quest.kernels.triton.words import LOW_UNIT, bytes_of
from vllm_quest.kernels.triton.workspace import Workspace
from vllm_quest.scorers.minmax.triton.softmax_mean import softmax_mean

__all__ = ["score_pages", "score_scratch"]

_REDUCES = ("max", "mean", "softmax_mean")
LOG2E = 1.4426950408889634


@triton.jit
def _load_signed_query(
    query, stride_head, first, STEP: tl.constexpr, group: tl.constexpr, shape: tl.constexpr
):
    """Every STEP-th channel of [min(q, 0) | max(q, 0)], of the group's heads: ``[WIDTH, DOT_ROWS]``."""
    GROUP: tl.constexpr = group.SIZE
    HEAD_SIZE: tl.constexpr = shape.HEAD_SIZE
    channel = first + tl.arange(0, shape.WIDTH)[:, None] * STEP
    head = tl.arange(0, DOT_ROWS)[None, :]
    inside = (channel < 2 * HEAD_SIZE) & (head < GROUP)
    q = tl.load(query + head * stride_head + channel % HEAD_SIZE, mask=inside, other=0.0).to(tl.float32)
    return tl.where(channel < HEAD_SIZE, tl.minimum(q, 0.0), tl.maximum(q, 0.0))


@triton.jit
def _load_params(bounds, block, spans, start, end, TILE: tl.constexpr, shape: tl.constexpr):
    """Offsets and scales of the tile's pages from `start` on, 0 from `end` on."""
    known = start + tl.arange(0, TILE) < end
    params = block.to(tl.int64) * bounds.stride_params + spans % shape.PAGES_PER_BLOCK * 2
    params = bounds.params + spread(params, 2, shape.SPAN, 2)
    return tl.load(params, mask=known, other=0.0), tl.load(params + 1, mask=known, other=0.0)


@triton.jit(do_not_specialize=["splits"])
def _score_kernel(
    query,
    bounds,
    contexts,
    out,
    scratch,
    scale_log2,
    splits,
    max_pages,
    shape: tl.constexpr,
    group: tl.constexpr,
    REDUCE: tl.constexpr,
    TILE: tl.constexpr,
    DOT: tl.constexpr,
    PTX: tl.constexpr,
):
    GROUP: tl.constexpr = group.SIZE
    HEAD_SIZE: tl.constexpr = shape.HEAD_SIZE
    PAGES_PER_BLOCK: tl.constexpr = shape.PAGES_PER_BLOCK
    SPAN: tl.constexpr = shape.SPAN
    UNIT: tl.constexpr = shape.UNIT
    CODED: tl.constexpr = bounds.params is not None
    split = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    total = tl.load(contexts.lengths + row)
    first, end, active = split_range(total, TILE, split, splits)
    if first >= end:
        return
    heads = query.data + row * query.stride_row + kv_head * GROUP * query.stride_head
    WORDS: tl.constexpr = HEAD_SIZE if CODED else 2 * HEAD_SIZE
    if not CODED:
        q = _load_signed_query(heads, query.stride_head, 0, 1, group, shape).to(DOT)
    else:  # a word of two codes meets an even and an odd channel
        q = _load_signed_query(heads, query.stride_head, 0, 2, group, shape)
        odd = _load_signed_query(heads, query.stride_head, 1, 2, group, shape)
        unit = power_of_two(tl.max(tl.max(tl.maximum(tl.abs(q), tl.abs(odd)), 1), 0))
        q, odd = (q / unit).to(DOT), (odd / unit).to(DOT)
        q_sum = tl.sum(q.to(tl.float32) + odd.to(tl.float32), 0)[None, :]
        bounds = Bounds(
            bounds.minmax,
            bounds.params + kv_head * bounds.stride_params_head,
            bounds.stride_block,
            bounds.stride_kv_head,
            bounds.stride_params,
            bounds.stride_params_head,
        )
    head_bounds = bounds.minmax + kv_head * bounds.stride_kv_head * UNIT
    block_table = contexts.block_table + row * contexts.stride_row
    out = out.data + row * out.stride_row + kv_head * out.stride_head
    pair = row * tl.num_programs(1) + kv_head
    raw = scratch.data + pair * GROUP * max_pages

    word = tl.arange(0, shape.WIDTH)[None, :]
    head = tl.arange(0, DOT_ROWS)[None, :]
    peak = tl.full([DOT_ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([DOT_ROWS], tl.float32)
    # Pages of one block are looked up together. Bounds are loaded several tiles ahead, offsets and scales
    # one, blocks another: nothing waits for them. (Where a value is carried over two iterations as it is, a
    # loop is not pipelined.)
    spans = first + tl.arange(0, TILE // SPAN) * SPAN
    block = tl.load(block_table + spans // PAGES_PER_BLOCK, mask=spans < end, other=0)
    place = block.to(tl.int64) * bounds.stride_block + spans % PAGES_PER_BLOCK * (WORDS // UNIT)
    if CODED:
        shift, step = _load_params(bounds, block, spans, first, end, TILE, shape)
    spans += TILE
    block = tl.load(block_table + spans // PAGES_PER_BLOCK, mask=spans < end, other=0)
    for start in tl.range(first, end, TILE):
        page = start + tl.arange(0, TILE)
        known = page < end
        offset = spread(place * UNIT, WORDS, SPAN, UNIT)
        place = block.to(tl.int64) * bounds.stride_block + spans % PAGES_PER_BLOCK * (WORDS // UNIT)
        if CODED:
            this_shift, this_step = shift[:, None], step[:, None]
            shift, step = _load_params(bounds, block, spans, start + TILE, end, TILE, shape)
        spans += TILE
        block = tl.load(block_table + spans // PAGES_PER_BLOCK, mask=spans < end, other=0)
        inside = known[:, None] & (word < WORDS)
        minmax = tl.load(head_bounds + offset[:, None] + word, mask=inside, other=0)
        if not CODED:
            score = tl.dot(minmax.to(DOT), q, input_precision="ieee")  # [TILE, DOT_ROWS]
        else:
            even_codes, odd_codes = bytes_of(minmax, DOT, PTX)
            score = tl.dot(even_codes, q, input_precision="ieee")
            score = tl.dot(odd_codes, odd, score, input_precision="ieee")
            if PTX:
                this_step *= LOW_UNIT
            score = (this_shift * q_sum + this_step * score) * unit
        if REDUCE == "max":
            tl.store(out + page, tl.max(tl.where(head < GROUP, score, float("-inf")), 1), mask=known)
        elif REDUCE == "mean":
            tl.store(out + page, tl.sum(tl.where(head < GROUP, score, 0.0), 1) / GROUP, mask=known)
        else:
            tl.store(raw + head * max_pages + page[:, None], score, mask=known[:, None] & (head < GROUP))
            score = tl.where(known[:, None], score, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(score, 0))
            norm = norm * tl.exp2((peak - new_peak) * scale_log2)
            norm += tl.sum(tl.exp2((score - new_peak[None, :]) * scale_log2), 0)
            peak = new_peak

    if REDUCE == "softmax_mean":
        partials = scratch.data + tl.num_programs(2) * tl.num_programs(1).to(tl.int64) * GROUP * max_pages
        partials += pair * splits * 2 * GROUP
        head = tl.arange(0, DOT_ROWS)
        tl.store(partials + split * 2 * GROUP + head, peak, mask=head < GROUP)
        tl.store(partials + split * 2 * GROUP + GROUP + head, norm, mask=head < GROUP)
        if arrive_last(scratch.arrivals + pair, active):
            softmax_mean(out, raw, partials, total, max_pages, active, scale_log2, group)


def score_scratch(
    pairs: int, group: int, max_pages: int, head_size: int, group_reduce: str, device: torch.device
) -> int:
    """Elements for `pairs` (row, KV head) pairs: for ``softmax_mean`` each query head's scores, and sums."""
    if group_reduce != "softmax_mean":
        return 0
    tiles = triton.cdiv(max_pages, choose("score", head_size, device).tile)
    return group * (pairs * max_pages + 2 * split_total("score", pairs, tiles, device))


def score_pages(
    query: torch.Tensor,
    summary: PageBounds,
    block_table: torch.Tensor,
    num_pages: torch.Tensor,
    scale: float,
    group_reduce: str,
    *,
    out: torch.Tensor | None = None,
    workspace: Workspace | None = None,
) -> torch.Tensor:
    """An upper bound of q . k over the keys of every page, one score per KV head. One launch.

    Args:
        query: ``[R, Hq, D]``, contiguous in D; query head h reads KV head ``h // (Hq / H)``; Hq / H at most
            16.
        summary: kmin and kmax of each page, finite, contiguous in the last three dimensions.
        block_table: ``[R, M]`` int32; only entries within the row's context are read.
        num_pages: ``[R]`` int32, pages in the context of each row; read on the device.
        scale: What attention multiplies q . k with; positive; matters to ``softmax_mean`` only.
        group_reduce: ``max``, ``mean`` or ``softmax_mean`` over the query heads of a KV head.
        out: ``[R, H, M * P]`` float32, written.
        workspace: For ``softmax_mean``; holds at least `score_scratch` elements.

    Returns:
        ``[R, H, M * P]`` float32. Unlike the reference's, it is not written where the row has no such page:
        filling a long table's width can cost more than the scores, and `select_pages` does not look there.

    Raises:
        ValueError: A shape, stride or choice that the kernel does not handle.
    """
    rows, num_heads, head_size = query.shape
    num_kv_heads, pages_per_block = summary.values.shape[1:3]
    group = check_group(num_heads, num_kv_heads)
    max_pages = block_table.shape[1] * pages_per_block
    if group_reduce not in _REDUCES:
        raise ValueError(f"group_reduce: {group_reduce!r}; allowed: {', '.join(_REDUCES)}")
    check_bounds(summary, head_size)
    if query.stride(2) != 1 or block_table.stride(1) != 1:
        raise ValueError("query, block_table: the last dimension must be contiguous")
    if out is None:
        out = query.new_empty((rows, num_kv_heads, max_pages), dtype=torch.float32)
    if out.shape != (rows, num_kv_heads, max_pages) or out.stride(2) != 1 or out.dtype != torch.float32:
        raise ValueError(
            f"out: {tuple(out.shape)} {out.dtype}; needed: {(rows, num_kv_heads, max_pages)} float32"
        )

    choice = choose("score", head_size, query.device)
    pairs = rows * num_kv_heads
    splits = split_count("score", pairs, triton.cdiv(max_pages, choice.tile), query.device)
    scratch, arrivals = out, num_pages  # not touched unless the reduction needs them
    if group_reduce == "softmax_mean":
        needed = score_scratch(pairs, group, max_pages, head_size, group_reduce, query.device)
        if workspace is None:
            workspace = Workspace.allocate(needed, pairs, query.device)
        workspace.check(needed, pairs)
        scratch, arrivals = workspace.scratch, workspace.arrivals
    values, params = summary
    if params is not None:  # two codes at a time
        values = values.view(torch.uint16)
    # Strides count 16 bytes where they can: so the compiler knows how the bounds are aligned.
    words = values.shape[3] * values.shape[4]
    unit = math.gcd(16 // values.itemsize, *values.stride()[:2], words)
    shape = ScoreShape(
        HEAD_SIZE=head_size,
        WIDTH=triton.next_power_of_2(2 * head_size * summary.values.itemsize // values.itemsize),
        PAGES_PER_BLOCK=pages_per_block,
        SPAN=min(choice.tile, pages_per_block & -pages_per_block),
        UNIT=unit,
    )
    _score_kernel[(splits, num_kv_heads, rows)](
        PerHead.of(query),
        Bounds.of(values, params, unit),
        Contexts.of(block_table, num_pages),
        PerHead.of(out),
        Scratch(scratch, arrivals),
        scale * LOG2E,
        splits,
        max_pages,
        shape=shape,
        group=Group.of(group),
        REDUCE=group_reduce,
        TILE=choice.tile,
        DOT=dot_type(values.dtype if params is None else torch.float16),
        PTX=takes_ptx(query.device),
        **choice.options,
    )
    return out
