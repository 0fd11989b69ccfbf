"""Attention of decode rows over the tokens of their selected pages only (section 3.3), split over the pages.

Each split keeps a running softmax over its tiles of gathered tokens. The last split of a (row, KV head) to
finish merges them by their log-sum-exp, in a fixed order: the result does not depend on which one was last.

Rows of short contexts read all their pages and need no list; the kernel knows them by their lengths.
"""

import torch
import triton
import triton.language as tl

from vllm_quest.formats.auto import AutoCache
from vllm_quest.kernels.triton.attend import Attention, attend
from vllm_quest.kernels.triton.launch import check_cache, choose
from vllm_quest.kernels.triton.lookup import block_of, page_at, spread
from vllm_quest.kernels.triton.merge import finish_split
from vllm_quest.kernels.triton.split import split_range
from vllm_quest.kernels.triton.structs import DOT_ROWS, Cache, PerHead, Shape, Split
from vllm_quest.kernels.triton.workspace import Workspace

__all__ = ["attend_pages"]


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
    workspace: Workspace | None = None,
) -> torch.Tensor:
    """Attention over the tokens of the selected pages only. One launch, the merge of the splits included.

    Args:
        query: ``[R, Hq, D]``, contiguous in D; Hq / H at most 16.
        cache: K and V, ``[B, H, N, D]`` each, of equal strides, contiguous in D.
        block_table: As for `kernels.triton.attend.attend`, and so are the others.
        seq_lens: Likewise.
        page_indices: Likewise.
        page_size: Tokens per page, a power of two.
        scale: Likewise.
        sparse_context: Likewise.
        value_threshold: Likewise.
        out: Likewise.
        workspace: Likewise.

    Returns:
        ``[R, Hq, D]`` in the query's dtype; accumulated in float32. Zeros where a row has no page to read.

    Raises:
        ValueError: A shape or stride that the kernel does not handle.
    """
    key_cache, value_cache = cache
    check_cache(key_cache, value_cache, page_size)
    kernel = "attend" if value_threshold is None else "attend_near"
    attention = Attention(
        kernel=_attend_kernel,
        cache=Cache.of(key_cache, value_cache),
        shape=Shape.of(key_cache, page_size),
        constants={},
        num_kv_heads=key_cache.shape[1],
        choice=choose(kernel, key_cache.shape[3], key_cache.device),
    )
    return attend(
        attention,
        query,
        block_table,
        seq_lens,
        page_indices,
        page_size,
        scale,
        sparse_context=sparse_context,
        value_threshold=value_threshold,
        out=out,
        workspace=workspace,
    )
