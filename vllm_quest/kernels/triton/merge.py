"""The end of every attention kernel: splits meet in device memory, and the last one to finish merges them."""

import triton
import triton.language as tl

from vllm_quest.kernels.triton.split import arrive_last

__all__ = ["finish_split"]

MERGED_ELEMENTS = tl.constexpr(8192)  # of the splits' outputs that a program loads at once


@triton.jit
def _merge_splits(
    out,
    partials,
    lse,
    active,
    group: tl.constexpr,
    shape: tl.constexpr,
):
    """Writes the sum of the splits' outputs, each weighted by its share of the softmax.

    Every thread has elements of its own and loads those of several splits at once: the threads need not wait
    for each other, and the latency of the loads shows once, not once per split.
    """
    GROUP: tl.constexpr = group.SIZE
    HEADS: tl.constexpr = group.PAD
    HEAD_SIZE: tl.constexpr = shape.HEAD_SIZE
    HEAD_PAD: tl.constexpr = shape.HEAD_PAD
    AT_ONCE: tl.constexpr = max(1, min(8, MERGED_ELEMENTS // (HEADS * HEAD_PAD)))
    element = tl.arange(0, HEADS * HEAD_PAD)
    head, channel = element // HEAD_PAD, element % HEAD_PAD
    inside = (head < GROUP) & (channel < HEAD_SIZE)
    lse += head
    partials += head * HEAD_SIZE + channel
    peak = tl.full([HEADS * HEAD_PAD], float("-inf"), tl.float32)
    for split in range(0, active):
        peak = tl.maximum(peak, tl.load(lse + split * GROUP, mask=inside, other=float("-inf")))
    # Splits whose tokens are all invisible have -inf: they must weigh nothing, and not make a NaN.
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    known_splits = tl.where(inside, active, 0)
    norm = tl.zeros([HEADS * HEAD_PAD], tl.float32)
    acc = tl.zeros([HEADS * HEAD_PAD], tl.float32)
    for first in range(0, active, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            split = first + i
            known = split < known_splits
            weight = tl.exp2(tl.load(lse + split * GROUP, mask=known, other=float("-inf")) - peak)
            norm += weight
            acc += weight * tl.load(partials + split * GROUP * HEAD_SIZE, mask=known, other=0.0)
    acc = acc / tl.where(norm > 0.0, norm, 1.0)
    tl.store(out.data + head * out.stride_head + channel, acc.to(out.data.dtype.element_ty), mask=inside)


@triton.jit
def finish_split(
    acc,
    peak,
    norm,
    out,
    scratch,
    row,
    kv_head,
    split,
    channel,
    in_head,
    group: tl.constexpr,
    shape: tl.constexpr,
):
    """Writes the output of a (row, KV head), or leaves it to its last split.

    `out` points at the first query head of the group; `channel` says which channels the columns of `acc`
    are, `in_head` which columns are none.
    """
    GROUP: tl.constexpr = group.SIZE
    HEAD_SIZE: tl.constexpr = shape.HEAD_SIZE
    head = tl.arange(0, acc.shape[0])
    inside = (head < GROUP)[:, None] & in_head[None, :]
    acc = acc / tl.where(norm > 0.0, norm, 1.0)[:, None]
    if split.active > 1:
        pair = row * tl.num_programs(1) + kv_head
        partials = scratch.data + pair * split.splits * GROUP * HEAD_SIZE
        lse = (
            scratch.data
            + (tl.num_programs(2) * tl.num_programs(1).to(tl.int64) * HEAD_SIZE + pair) * split.splits * GROUP
        )
        places = (split.number * GROUP + head[:, None]) * HEAD_SIZE + channel[None, :]
        tl.store(partials + places, acc, mask=inside)
        tl.store(lse + split.number * GROUP + head, peak + tl.log2(norm), mask=head < GROUP)
        if arrive_last(scratch.arrivals + pair, split.active):
            _merge_splits(out, partials, lse, split.active, group, shape)
    else:
        targets = out.data + head[:, None] * out.stride_head + channel[None, :]
        tl.store(targets, acc.to(out.data.dtype.element_ty), mask=inside)
