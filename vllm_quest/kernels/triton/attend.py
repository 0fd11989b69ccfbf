"""Attention of decode rows over the tokens of their selected pages only (section 3.3), split over the pages.

Each split keeps a running softmax over its tiles of gathered tokens. The last split of a (row, KV head) to
finish merges them by their log-sum-exp, in a fixed order: the result does not depend on which one was last.

Rows of short contexts read all their pages and need no list; the kernel knows them by their lengths.
"""

import math

import torch
import triton
import triton.language as tl

from vllm_quest.kernels.triton.attend_int4 import Attention, int4_attention
from vllm_quest.kernels.triton.launch import (
    SPLIT_TOKENS,
    check_cache,
    check_group,
    choose,
    dot_type,
    split_count,
)
from vllm_quest.kernels.triton.lookup import block_of, page_at, spread
from vllm_quest.kernels.triton.merge import finish_split
from vllm_quest.kernels.triton.split import split_range
from vllm_quest.kernels.triton.structs import (
    DOT_ROWS,
    Cache,
    Contexts,
    Group,
    PerHead,
    Scratch,
    Selection,
    Shape,
    Split,
)
from vllm_quest.kernels.triton.workspace import Workspace, attend_scratch, longest_read
from vllm_quest.layout import Int4Keys, Int4Values, KeyCache, ValueCache

__all__ = ["attend_pages"]

LOG2E = 1.4426950408889634
EVERY_ROW = 2**31 - 1  # a `min_context` that no context reaches


@triton.jit(do_not_specialize=["splits", "sparse_context"])
def _attend_kernel(
    out,
    scratch,
    query,
    cache,
    contexts,
    selection,
    scale_log2,
    least_weight,
    splits,
    sparse_context,
    shape: tl.constexpr,
    group: tl.constexpr,
    TILE: tl.constexpr,
    DOT: tl.constexpr,
):
    GROUP: tl.constexpr = group.SIZE
    HEAD_SIZE: tl.constexpr = shape.HEAD_SIZE
    HEAD_PAD: tl.constexpr = shape.HEAD_PAD
    TOKEN_STRIDE: tl.constexpr = shape.TOKEN_STRIDE
    PAGE_SIZE: tl.constexpr = shape.PAGE_SIZE
    split = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    seq_len = tl.load(contexts.lengths + row)
    reads_list = seq_len >= sparse_context
    pages = tl.cdiv(seq_len, PAGE_SIZE)
    slots = tl.where(reads_list, tl.minimum(pages, selection.budget_pages), pages) * PAGE_SIZE
    visible_end = slots - (pages * PAGE_SIZE - seq_len)  # the row's last page is the last of its list
    first, end, active = split_range(slots, TILE, split, splits)
    head = tl.arange(0, DOT_ROWS)[:, None]
    channel = tl.arange(0, HEAD_PAD)[None, :]
    inside = (head < GROUP) & (channel < HEAD_SIZE)
    out_start = out.data + row * out.stride_row + kv_head * GROUP * out.stride_head
    acc = tl.zeros([DOT_ROWS, HEAD_PAD], tl.float32)
    if first >= end:
        if active == 0 and split == 0:
            nothing = acc.to(out_start.dtype.element_ty)
            tl.store(out_start + head * out.stride_head + channel, nothing, mask=inside)
        return

    q = query.data + row * query.stride_row + kv_head * GROUP * query.stride_head
    q = tl.load(q + head * query.stride_head + channel, mask=inside, other=0.0).to(DOT)
    key_cache = cache.key + kv_head * cache.stride_kv_head
    value_cache = cache.value + kv_head * cache.stride_kv_head
    block_table = contexts.block_table + row * contexts.stride_row
    page_indices = selection.page_indices + row * selection.stride_row + kv_head * selection.stride_head
    peak = tl.full([DOT_ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([DOT_ROWS], tl.float32)
    PAGES_PER_BLOCK: tl.constexpr = shape.BLOCK_SIZE // PAGE_SIZE
    SPAN: tl.constexpr = min(TILE, PAGE_SIZE)
    last_place = tl.cdiv(end, PAGE_SIZE)
    listed = tl.where(reads_list, last_place, 0)
    slot = first + tl.arange(0, TILE // SPAN) * SPAN
    page = page_at(slot // PAGE_SIZE, listed, page_indices)
    block = block_of(page, slot // PAGE_SIZE, last_place, block_table, PAGES_PER_BLOCK)
    in_block = page % PAGES_PER_BLOCK * PAGE_SIZE + slot % PAGE_SIZE
    page = page_at((slot + TILE) // PAGE_SIZE, listed, page_indices)
    for start in tl.range(first, end, TILE):
        offset = block.to(tl.int64) * cache.stride_block + in_block * TOKEN_STRIDE
        offset = spread(offset, TOKEN_STRIDE, SPAN, 8)  # 16 bytes
        offset = offset[:, None] + channel
        slot += TILE
        block = block_of(page, slot // PAGE_SIZE, last_place, block_table, PAGES_PER_BLOCK)
        in_block = page % PAGES_PER_BLOCK * PAGE_SIZE + slot % PAGE_SIZE
        page = page_at((slot + TILE) // PAGE_SIZE, listed, page_indices)
        visible = start + tl.arange(0, TILE) < visible_end
        loaded = visible[:, None] & (channel < HEAD_SIZE)
        key = tl.load(key_cache + offset, mask=loaded, other=0.0).to(DOT)
        logits = tl.dot(q, tl.trans(key), input_precision="ieee") * scale_log2
        logits = tl.where(visible[None, :], logits, float("-inf"))  # [DOT_ROWS, TILE]
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(logits - base[:, None])
        rescale = tl.exp2(peak - base)
        if least_weight is not None:
            read = tl.max(tl.where(head < GROUP, weights, 0.0), 0) > least_weight
            weights = tl.where(read[None, :], weights, 0.0)
            loaded = loaded & read[:, None]
        norm = norm * rescale + tl.sum(weights, 1)
        value = tl.load(value_cache + offset, mask=loaded, other=0.0).to(DOT)
        acc = tl.dot(weights.to(DOT), value, acc * rescale[:, None], input_precision="ieee")
        peak = new_peak

    channels = tl.arange(0, HEAD_PAD)
    finish_split(
        acc, peak, norm, PerHead(out_start, out.stride_row, out.stride_head), scratch, row, kv_head,
        Split(split, splits, active), channels, channels < HEAD_SIZE, group, shape,
    )  # fmt: skip


def _attention(
    key_cache: torch.Tensor, value_cache: torch.Tensor, page_size: int, value_threshold: float | None
) -> Attention:
    """Attention over K and V in the model's dtype."""
    check_cache(key_cache, value_cache, page_size)
    num_kv_heads, head_size = key_cache.shape[1], key_cache.shape[3]
    kernel = "attend" if value_threshold is None else "attend_near"
    return Attention(
        kernel=_attend_kernel,
        cache=Cache.of(key_cache, value_cache),
        shape=Shape.of(key_cache, page_size),
        constants={},
        num_kv_heads=num_kv_heads,
        choice=choose(kernel, head_size, key_cache.device),
    )


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
    out: torch.Tensor | None = None,
    workspace: Workspace | None = None,
) -> torch.Tensor:
    """Attention over the tokens of the selected pages only. One launch, the merge of the splits included.

    Args:
        query: ``[R, Hq, D]``, contiguous in D; Hq / H at most 16.
        key_cache: ``[B, H, N, D]``, contiguous in D, or 4-bit codes.
        value_cache: ``[B, H, N, D]``, with the strides of `key_cache`, or 4-bit codes.
        block_table: ``[R, M]`` int32; only entries of pages to read are read.
        seq_lens: ``[R]`` int32; the last page may be partly filled. 0 for the padding rows of a CUDA graph.
        page_indices: ``[R, H, K]`` int32, as `select_pages` returns it: K of the row's pages in ascending
            order, or all it has, the last one always among them. None: every row reads every page.
        page_size: Tokens per page, a power of two.
        scale: Factor of q . k.
        min_context: Rows of fewer tokens read every page, whatever `page_indices` holds.
        value_threshold: V rows are not loaded where no query head of the group has e^-value_threshold of the
            largest probability that its split has met so far; None loads every V row.
        out: ``[R, Hq, D]``, written.
        workspace: Holds at least `attend_scratch` elements.

    Returns:
        ``[R, Hq, D]`` in the query's dtype; accumulated in float32. Zeros where a row has no page to read.

    Raises:
        ValueError: A shape or stride that the kernel does not handle.
    """
    if isinstance(key_cache, Int4Keys) and isinstance(value_cache, Int4Values):
        attention = int4_attention(key_cache, value_cache, page_size, value_threshold)
    else:
        assert isinstance(key_cache, torch.Tensor)
        assert isinstance(value_cache, torch.Tensor)
        attention = _attention(key_cache, value_cache, page_size, value_threshold)
    rows, num_heads, head_size = query.shape
    num_kv_heads = attention.num_kv_heads
    group = check_group(num_heads, num_kv_heads)
    if page_indices is None:  # its place is taken by what is not read
        page_indices, min_context = block_table[:, None], EVERY_ROW
    budget_pages = page_indices.shape[2]
    if query.stride(2) != 1 or block_table.stride(1) != 1 or page_indices.stride(2) != 1:
        raise ValueError("query, block_table, page_indices: the last dimension must be contiguous")
    if out is None:
        out = torch.empty_like(query)
    if out.shape != query.shape or out.stride(2) != 1:
        raise ValueError(f"out: {tuple(out.shape)}; needed: {tuple(query.shape)}, contiguous in D")

    pairs = rows * num_kv_heads
    max_pages = block_table.shape[1] * (attention.shape.BLOCK_SIZE // page_size)
    most_tokens = longest_read(max_pages, budget_pages, page_size, min_context)
    splits = split_count("attend", pairs, triton.cdiv(most_tokens, SPLIT_TOKENS), query.device)
    needed = attend_scratch(pairs, group, head_size, most_tokens, query.device)
    if workspace is None:
        workspace = Workspace.allocate(needed, pairs, query.device)
    workspace.check(needed, pairs)
    attention.kernel[(splits, num_kv_heads, rows)](
        PerHead.of(out),
        Scratch(workspace.scratch, workspace.arrivals),
        PerHead.of(query),
        attention.cache,
        Contexts.of(block_table, seq_lens),
        Selection.of(page_indices),
        scale * LOG2E,
        None if value_threshold is None else math.exp(-value_threshold),
        splits,
        min_context,
        shape=attention.shape,
        group=Group.of(group),
        TILE=attention.choice.tile,
        DOT=dot_type(query.dtype),
        **attention.constants,
        **attention.choice.options,
    )
    return out
