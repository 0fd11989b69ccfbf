"""`attend_pages` over 4-bit pages: as in `attend`, but K and V are dequantized in registers.

A tile is of byte rows; each holds two tokens of a page, so that K, V and the logits come as two tiles. Only a
row's last page has residuals; its tiles come after the others.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from vllm_quest.kernels.triton.codes import (
    NO_FRACTION,
    TAGS,
    as_float,
    fraction,
    group_channels,
    limited,
    load_residual,
    read_values,
)
from vllm_quest.kernels.triton.launch import Choice, Int4Cache, choose
from vllm_quest.kernels.triton.merge import finish_split
from vllm_quest.kernels.triton.split import split_range
from vllm_quest.layout import Int4Keys, Int4Values

__all__ = ["Attention", "int4_attention"]

PART = tl.constexpr(1 / 15)  # of a range, a quantizer's step


@triton.jit
def _codes(bytes, rest, HAS_REST: tl.constexpr):
    """Codes of the low and the high tokens in float32; of 8 bits, where there is a residual."""
    bytes = bytes.to(tl.int32)
    low, high = as_float(bytes & 15), as_float(bytes >> 4)
    if HAS_REST:
        low += fraction(rest & 15)
        high += fraction(rest >> 4)
    return low, high


@triton.jit
def _find_pages(
    start,
    end,
    page_indices,
    block_table,
    reads_list,
    run,
    stride_block,
    PAGES_PER_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Of each of the next ROWS byte rows of the list: its run, and its page's number in it."""
    ordinal = (start + tl.arange(0, ROWS)) // HALF
    listed = tl.where(reads_list, tl.cdiv(end, HALF), 0)
    page = tl.load(page_indices + ordinal, mask=ordinal < listed, other=0)
    page = tl.where(reads_list, page, ordinal)
    block = tl.load(block_table + page // PAGES_PER_BLOCK, mask=ordinal * HALF < end, other=0).to(tl.int64)
    return run + block * stride_block, page % PAGES_PER_BLOCK


@triton.jit
def _attend_tile(
    q,
    acc,
    peak,
    norm,
    start,
    run,
    page,
    seen,
    residual_start,
    key_codes,
    key_residual,
    value_codes,
    value_params,
    value_residual,
    bounds,
    bound_params,
    scale_log2,
    least_weight,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    DOT: tl.constexpr,
    IS_FLOAT16: tl.constexpr,
    HAS_REST: tl.constexpr,
):
    """The softmax so far, with the tokens of ROWS byte rows of the list from `start` on.

    `seen` tokens of the list are visible. With HAS_REST, the rows from `residual_start` on have residuals.
    """
    HALF: tl.constexpr = PAGE_SIZE // 2
    slot = start + tl.arange(0, ROWS)
    half_row = slot % HALF
    token = slot // HALF * PAGE_SIZE + half_row  # of the list
    low_seen, high_seen = token < seen, token + HALF < seen
    row = run * 16 + (page * HALF + half_row) * HEAD_SIZE

    channel = tl.arange(0, HEAD_PAD)[None, :]
    loaded = low_seen[:, None] & (channel < HEAD_SIZE)
    key_bytes = tl.load(key_codes + row[:, None] + channel, mask=loaded, other=0)
    UNITS: tl.constexpr = 128 // bounds.dtype.element_ty.primitive_bitwidth
    bound_row = bounds + (run * UNITS + page * (2 * HEAD_SIZE))[:, None] + channel
    kmin = tl.load(bound_row, mask=loaded, other=0)
    kmax = tl.load(bound_row + HEAD_SIZE, mask=loaded, other=0)
    if bound_params is not None:
        pair = bound_params + run * 4 + page * 2
        scale = tl.load(pair + 1, mask=low_seen, other=0.0)[:, None]
        kmin, kmax = as_float(kmin.to(tl.int32)), as_float(kmax.to(tl.int32))
        step = (scale * PART) * (kmax - kmin)
        kmin = tl.load(pair, mask=low_seen, other=0.0)[:, None] + scale * kmin
    else:
        kmin, kmax = kmin.to(tl.float32), kmax.to(tl.float32)
        step = kmax * PART - kmin * PART  # their difference might not be finite
    key_rest = key_bytes
    has_rest = low_seen & (slot >= residual_start)
    if HAS_REST:
        rest_row = run * 16 + half_row * HEAD_SIZE
        mask = has_rest[:, None] & (channel < HEAD_SIZE)
        key_rest = load_residual(key_residual + rest_row[:, None] + channel, mask)
        # The tag's place: the page's last token has 4 bits.
        is_tag = (half_row == HALF - 1)[:, None]
        key_rest = tl.where(is_tag, key_rest & 15 | (NO_FRACTION << 4), key_rest)
    low, high = _codes(key_bytes, key_rest, HAS_REST)
    low_key = limited(kmin + step * low, IS_FLOAT16).to(DOT)
    high_key = limited(kmin + step * high, IS_FLOAT16).to(DOT)
    low_logits = tl.dot(q, tl.trans(low_key), input_precision="ieee") * scale_log2
    high_logits = tl.dot(q, tl.trans(high_key), input_precision="ieee") * scale_log2
    low_logits = tl.where(low_seen[None, :], low_logits, float("-inf"))  # [16, ROWS]
    high_logits = tl.where(high_seen[None, :], high_logits, float("-inf"))

    new_peak = tl.maximum(peak, tl.max(tl.maximum(low_logits, high_logits), 1))
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    low_weights, high_weights = tl.exp2(low_logits - base[:, None]), tl.exp2(high_logits - base[:, None])
    rescale = tl.exp2(peak - base)
    read = low_seen
    if least_weight is not None:
        in_group = tl.arange(0, 16)[:, None] < GROUP
        low_read = tl.max(tl.where(in_group, low_weights, 0.0), 0) > least_weight
        high_read = tl.max(tl.where(in_group, high_weights, 0.0), 0) > least_weight
        low_weights = tl.where(low_read[None, :], low_weights, 0.0)
        high_weights = tl.where(high_read[None, :], high_weights, 0.0)
        read = low_seen & (low_read | high_read)
    norm = norm * rescale + tl.sum(low_weights + high_weights, 1)

    value_channel, in_head = group_channels(GROUPS, HEAD_SIZE // GROUPS, GROUPS_PAD, GROUP_PAD)
    mask = read[:, None] & in_head[None, :]
    value_bytes = tl.load(value_codes + row[:, None] + value_channel[None, :], mask=mask, other=0)
    value_rest = value_bytes
    if HAS_REST:
        rest = value_residual + rest_row[:, None] + value_channel[None, :]
        value_rest = load_residual(rest, mask & has_rest[:, None])
    low, high = _codes(value_bytes, value_rest, HAS_REST)
    group = tl.arange(0, GROUPS_PAD)[None, :]
    params = run * 4 + (page * PAGE_SIZE + half_row) * GROUPS
    params = value_params + params[:, None] + group
    in_groups = group < GROUPS
    low_value = read_values(low, params, low_seen[:, None] & in_groups, GROUPS_PAD)
    low_value = limited(low_value, IS_FLOAT16).to(DOT)
    acc = tl.dot(low_weights.to(DOT), low_value, acc * rescale[:, None], input_precision="ieee")
    high_value = read_values(high, params + HALF * GROUPS, high_seen[:, None] & in_groups, GROUPS_PAD)
    high_value = limited(high_value, IS_FLOAT16).to(DOT)
    acc = tl.dot(high_weights.to(DOT), high_value, acc, input_precision="ieee")
    return acc, new_peak, norm


@triton.jit(do_not_specialize=["splits", "min_context"])
def _attend_int4_kernel(
    query,
    key_codes,
    key_residual,
    value_codes,
    value_params,
    value_residual,
    bounds,
    bound_params,
    block_table,
    seq_lens,
    page_indices,
    out,
    scratch,
    arrivals,
    scale_log2,
    least_weight,
    splits,
    budget_pages,
    min_context,
    stride_query_row,
    stride_query_head,
    stride_block,
    stride_kv_head,
    stride_table,
    stride_pages_row,
    stride_pages_head,
    stride_out_row,
    stride_out_head,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    DOT: tl.constexpr,
):
    HALF: tl.constexpr = PAGE_SIZE // 2
    PAGES_PER_BLOCK: tl.constexpr = BLOCK_SIZE // PAGE_SIZE
    ROWS: tl.constexpr = TILE // 2
    IS_FLOAT16: tl.constexpr = query.dtype.element_ty == tl.float16
    split = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    seq_len = tl.load(seq_lens + row)
    reads_list = seq_len >= min_context
    pages = tl.cdiv(seq_len, PAGE_SIZE)
    pages_read = tl.where(reads_list, tl.minimum(pages, budget_pages), pages)
    total = pages_read * HALF
    seen = pages_read * PAGE_SIZE - (pages * PAGE_SIZE - seq_len)  # the row's last page is the list's last
    first, end, active = split_range(total, ROWS, split, splits)
    out += row * stride_out_row + kv_head * GROUP * stride_out_head
    value_channel, in_head = group_channels(GROUPS, HEAD_SIZE // GROUPS, GROUPS_PAD, GROUP_PAD)
    head = tl.arange(0, 16)
    channel = tl.arange(0, HEAD_PAD)
    inside = (head < GROUP)[:, None] & (channel < HEAD_SIZE)[None, :]
    if first >= end:
        if active == 0 and split == 0:
            nothing = tl.zeros([16, HEAD_PAD], tl.float32).to(out.dtype.element_ty)
            tl.store(out + head[:, None] * stride_out_head + channel[None, :], nothing, mask=inside)
        return

    query += row * stride_query_row + kv_head * GROUP * stride_query_head
    q = tl.load(query + head[:, None] * stride_query_head + channel[None, :], mask=inside, other=0.0).to(DOT)
    run = kv_head * stride_kv_head
    block_table += row * stride_table
    page_indices += row * stride_pages_row + kv_head * stride_pages_head
    acc = tl.zeros([16, GROUPS_PAD * GROUP_PAD], tl.float32)
    peak = tl.full([16], float("-inf"), tl.float32)
    norm = tl.zeros([16], tl.float32)
    # The tiles of the row's last page come behind the loop, which then reads no residual.
    plain_end = tl.minimum(end, first + tl.maximum(total - HALF - first, 0) // ROWS * ROWS)
    page_run, page = _find_pages(
        first, end, page_indices, block_table, reads_list, run, stride_block, PAGES_PER_BLOCK, HALF, ROWS
    )
    for start in tl.range(first, plain_end, ROWS):
        this_run, this_page = page_run, page
        # One tile ahead: K and V whose addresses are known are loaded several tiles ahead.
        page_run, page = _find_pages(
            start + ROWS, end, page_indices, block_table, reads_list, run, stride_block,
            PAGES_PER_BLOCK, HALF, ROWS,
        )  # fmt: skip
        acc, peak, norm = _attend_tile(
            q, acc, peak, norm, start, this_run, this_page, seen, total,
            key_codes, key_residual, value_codes, value_params, value_residual, bounds, bound_params,
            scale_log2, least_weight, GROUP, HEAD_SIZE, HEAD_PAD, GROUPS, GROUPS_PAD, GROUP_PAD,
            PAGE_SIZE, ROWS, DOT, IS_FLOAT16, False,
        )  # fmt: skip
    for start in tl.range(plain_end, end, ROWS, num_stages=1):
        last_page = pages - 1
        last_block = tl.load(block_table + last_page // PAGES_PER_BLOCK).to(tl.int64)
        tag_at = (run + last_block * stride_block) * 16 + (HALF - 1) * HEAD_SIZE
        tag = tl.load(key_residual + tag_at).to(tl.int32) >> 4
        residual_start = tl.where(tag == last_page % PAGES_PER_BLOCK % TAGS, total - HALF, total)
        page_run, page = _find_pages(
            start, end, page_indices, block_table, reads_list, run, stride_block, PAGES_PER_BLOCK, HALF, ROWS
        )
        acc, peak, norm = _attend_tile(
            q, acc, peak, norm, start, page_run, page, seen, residual_start,
            key_codes, key_residual, value_codes, value_params, value_residual, bounds, bound_params,
            scale_log2, least_weight, GROUP, HEAD_SIZE, HEAD_PAD, GROUPS, GROUPS_PAD, GROUP_PAD,
            PAGE_SIZE, ROWS, DOT, IS_FLOAT16, True,
        )  # fmt: skip
    finish_split(
        acc, peak, norm, out, scratch, arrivals, row, kv_head, split, splits, active, stride_out_head,
        value_channel, in_head, GROUP, HEADS, HEAD_SIZE, HEAD_PAD,
    )  # fmt: skip


class Attention(NamedTuple):
    """How attention reads a cache."""

    kernel: JITFunction
    parts: tuple  # of the cache, as the kernel is given them
    strides: tuple[int, ...]  # theirs
    constants: dict[str, int]
    num_kv_heads: int
    choice: Choice


def int4_attention(
    key_cache: Int4Keys, value_cache: Int4Values, page_size: int, value_threshold: float | None
) -> Attention:
    """Attention over 4-bit pages.

    Raises:
        ValueError: A cache that the kernel does not handle.
    """
    cache = Int4Cache.of(key_cache, value_cache)
    kernel = "attend_int4" if value_threshold is None else "attend_int4_near"
    if page_size != cache.page_size:
        raise ValueError(f"page_size: {page_size}; the cache has pages of {cache.page_size} tokens")
    return Attention(
        kernel=_attend_int4_kernel,
        parts=cache[:7],
        strides=(cache.stride_block, cache.stride_kv_head),
        constants=cache.constants,
        num_kv_heads=cache.num_kv_heads,
        choice=choose(kernel, cache.head_size, cache.key.device),
    )
