"""`attend_pages` over 4-bit pages: as in `formats.auto.triton`, but the tensor cores take K and V as codes.

K of a page is kmin + step * code, channel by channel, so that

    q . k = sum_i q_i * kmin_i + sum_i (q_i * step_i) * code_i

and a page's kmin and step meet the query once, not every key. The rows of the tensor cores' tile are
then query heads of a page: of the tile's first page, of its second, and so on, each with a softmax of its own
over the page's tokens. They meet when all tiles are read, as splits do. V of a token is zero + scale * code;
where all channels share them, the softmax weights take them in.

A tile is of byte rows; each holds two tokens of a page, and is read in words of two bytes, an even and an odd
channel. So codes come as four tiles, logits as two. Only a row's last page has residuals; its tile is last.
"""

import torch
import triton
import triton.language as tl

from vllm_quest.formats.int4 import Int4Cache
from vllm_quest.formats.int4.triton.attend_tile import attend_tile
from vllm_quest.formats.int4.triton.structs import Int4Parts, Places, Softmax, Span, WideQuery, Words
from vllm_quest.kernels.triton.attend import Attention, attend
from vllm_quest.kernels.triton.codes import LARGEST_FLOAT16, TAGS, group_channels, power_of_two
from vllm_quest.kernels.triton.launch import choose, dot_type, takes_ptx
from vllm_quest.kernels.triton.lookup import block_of, page_at
from vllm_quest.kernels.triton.merge import finish_split
from vllm_quest.kernels.triton.split import split_range
from vllm_quest.kernels.triton.structs import DOT_ROWS, PerHead, Split
from vllm_quest.kernels.triton.words import LOW_UNIT
from vllm_quest.kernels.triton.workspace import Workspace

__all__ = ["attend_pages"]

QUERY_SCALE = tl.constexpr(2.0**-7)  # of the query, which then has room in float16 for 8-bit steps


@triton.jit
def _join_pages(acc, peak, norm, HEADS: tl.constexpr):
    """One row per query head, from those of the tiles' first pages, of their second ones, ..."""
    PAGES: tl.constexpr = acc.shape[0] // HEADS
    peak = tl.reshape(peak, [PAGES, HEADS])
    top = tl.max(peak, 0)
    share = tl.exp2(peak - tl.where(top == float("-inf"), 0.0, top)[None, :])
    norm = tl.sum(share * tl.reshape(norm, [PAGES, HEADS]), 0)
    acc = tl.sum(share[:, :, None] * tl.reshape(acc, [PAGES, HEADS, acc.shape[1]]), 0)
    return acc, top, norm


@triton.jit(do_not_specialize=["splits", "sparse_context"])
def _attend_int4_kernel(
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
    words: tl.constexpr,
    TILE: tl.constexpr,
    DOT: tl.constexpr,
):
    GROUP: tl.constexpr = group.SIZE
    HEADS: tl.constexpr = group.PAD
    HEAD_SIZE: tl.constexpr = shape.HEAD_SIZE
    HEAD_PAD: tl.constexpr = shape.HEAD_PAD
    GROUPS: tl.constexpr = shape.GROUPS
    WIDTH: tl.constexpr = shape.GROUPS_PAD * shape.CHANNELS_PAD
    PAGE_SIZE: tl.constexpr = shape.PAGE_SIZE
    HALF: tl.constexpr = PAGE_SIZE // 2
    PAGES_PER_BLOCK: tl.constexpr = shape.BLOCK_SIZE // PAGE_SIZE
    # At least the 16 rows that a tensor core takes, of query heads and, as tokens are summed up, of bytes.
    PAGES: tl.constexpr = max(2 * DOT_ROWS // PAGE_SIZE, min(DOT_ROWS // HEADS, TILE // PAGE_SIZE), 1)
    ROWS: tl.constexpr = PAGES * HALF
    M: tl.constexpr = max(DOT_ROWS, PAGES * HEADS)
    IS_FLOAT16: tl.constexpr = query.data.dtype.element_ty == tl.float16
    split = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    seq_len = tl.load(contexts.lengths + row)
    all_pages = tl.cdiv(seq_len, PAGE_SIZE)
    reads_list = seq_len >= sparse_context
    pages = tl.where(reads_list, tl.minimum(all_pages, selection.budget_pages), all_pages)
    listed = tl.where(reads_list, pages, 0)
    tokens = pages * PAGE_SIZE - (all_pages * PAGE_SIZE - seq_len)  # the row's last page is the list's last
    first, end, active = split_range(pages, PAGES, split, splits)
    out_start = out.data + row * out.stride_row + kv_head * GROUP * out.stride_head
    value_channel, in_head = group_channels(GROUPS, HEAD_SIZE // GROUPS, shape.GROUPS_PAD, shape.CHANNELS_PAD)
    channel = tl.arange(0, HEAD_PAD)[None, :]
    if first >= end:
        if active == 0 and split == 0:
            head = tl.arange(0, HEADS)[:, None]
            inside = (head < GROUP) & (channel < HEAD_SIZE)
            nothing = tl.zeros([HEADS, HEAD_PAD], tl.float32).to(out_start.dtype.element_ty)
            tl.store(out_start + head * out.stride_head + channel, nothing, mask=inside)
        return

    slot = tl.arange(0, M)
    head = slot % HEADS
    q = query.data + row * query.stride_row + kv_head * GROUP * query.stride_head
    inside = (head < GROUP)[:, None] & (channel < HEAD_SIZE)
    q = tl.load(q + head[:, None] * query.stride_head + channel, mask=inside, other=0.0).to(tl.float32)
    q_scale = power_of_two(tl.max(tl.abs(q), 1)) / QUERY_SCALE
    logit_scale = q_scale * scale_log2
    q_even, q_odd = tl.split(tl.reshape(q / q_scale[:, None], [M, HEAD_PAD // 2, 2]))
    wide_query = WideQuery(q_even, q_odd, logit_scale)
    run = kv_head * cache.stride_kv_head
    block_table = contexts.block_table + row * contexts.stride_row
    page_indices = selection.page_indices + row * selection.stride_row + kv_head * selection.stride_head
    softmax = Softmax(
        tl.zeros([M, WIDTH // 2], tl.float32),
        tl.zeros([M, WIDTH // 2], tl.float32),
        tl.full([M], float("-inf"), tl.float32),
        tl.zeros([M], tl.float32),
        tl.zeros([M], tl.float32),
    )
    # The tile of the row's last page comes behind the loop, which then reads no residual.
    plain_end = tl.minimum(end, first + tl.maximum(pages - 1 - first, 0) // PAGES * PAGES)
    # Of every byte row, and of every row of the query.
    place, head_place = first + tl.arange(0, ROWS) // HALF, first + slot // HEADS
    page, head_page = page_at(place, listed, page_indices), page_at(head_place, listed, page_indices)
    block = block_of(page, place, end, block_table, PAGES_PER_BLOCK)
    head_block = block_of(head_page, head_place, end, block_table, PAGES_PER_BLOCK)
    in_block, head_in_block = page % PAGES_PER_BLOCK, head_page % PAGES_PER_BLOCK
    page = page_at(place + PAGES, listed, page_indices)
    head_page = page_at(head_place + PAGES, listed, page_indices)
    for start in tl.range(first, plain_end, PAGES):
        this_run, this_page = run + block.to(tl.int64) * cache.stride_block, in_block
        head_run, this_head_page = run + head_block.to(tl.int64) * cache.stride_block, head_in_block
        place += PAGES
        head_place += PAGES
        block = block_of(page, place, end, block_table, PAGES_PER_BLOCK)
        head_block = block_of(head_page, head_place, end, block_table, PAGES_PER_BLOCK)
        in_block, head_in_block = page % PAGES_PER_BLOCK, head_page % PAGES_PER_BLOCK
        page = page_at(place + PAGES, listed, page_indices)
        head_page = page_at(head_place + PAGES, listed, page_indices)
        softmax = attend_tile(
            wide_query, softmax, cache, start, Places(this_run, this_page, head_run, this_head_page),
            Span(pages, tokens, pages), least_weight, shape, group, words, ROWS, DOT, IS_FLOAT16, False,
        )  # fmt: skip
    if GROUPS == 1 and words.PTX and IS_FLOAT16:
        softmax = Softmax(
            softmax.even * LOW_UNIT, softmax.odd * LOW_UNIT, softmax.peak, softmax.norm, softmax.zeros
        )
    if plain_end < end:
        last_page = all_pages - 1
        last_block = tl.load(block_table + last_page // PAGES_PER_BLOCK).to(tl.int64)
        tag_at = (run + last_block * cache.stride_block) * 8 + (HALF - 1) * (HEAD_SIZE // 2)
        tag = tl.load(cache.key_residual + tag_at).to(tl.int32) >> 4 & 15
        residual_start = tl.where(tag == last_page % PAGES_PER_BLOCK % TAGS, pages - 1, pages)
        this_run = run + block.to(tl.int64) * cache.stride_block
        head_run = run + head_block.to(tl.int64) * cache.stride_block
        softmax = attend_tile(
            wide_query, softmax, cache, plain_end, Places(this_run, in_block, head_run, head_in_block),
            Span(pages, tokens, residual_start), least_weight, shape, group, words, ROWS, DOT, IS_FLOAT16,
            True,
        )  # fmt: skip
    acc = tl.reshape(tl.join(softmax.even, softmax.odd), [M, WIDTH]) + softmax.zeros[:, None]
    if IS_FLOAT16:  # rounded bounds and zero points may lie beyond float16; the output does not
        most = LARGEST_FLOAT16 * softmax.norm[:, None]
        acc = tl.minimum(tl.maximum(acc, -most), most)
    acc, peak, norm = _join_pages(acc, softmax.peak, softmax.norm, HEADS)
    finish_split(
        acc, peak, norm, PerHead(out_start, out.stride_row, out.stride_head), scratch, row, kv_head,
        Split(split, splits, active), value_channel, in_head, group, shape,
    )  # fmt: skip


def attend_pages(
    query: torch.Tensor,
    cache: Int4Cache,
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
        cache: 4-bit codes, in token-major pages.
        block_table: As for `kernels.triton.attend.attend`, and so are the others.
        seq_lens: Likewise.
        page_indices: Likewise.
        page_size: Tokens per page, as the cache has them.
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
    parts = Int4Parts.of(*cache)
    if page_size != parts.page_size:
        raise ValueError(f"page_size: {page_size}; the cache has pages of {parts.page_size} tokens")
    kernel = "attend_int4" if value_threshold is None else "attend_int4_near"
    attention = Attention(
        kernel=_attend_int4_kernel,
        cache=parts.words,
        shape=parts.shape,
        constants={"words": Words(dot_type(torch.float16), takes_ptx(parts.key.device))},
        num_kv_heads=parts.num_kv_heads,
        choice=choose(kernel, parts.head_size, parts.key.device),
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
