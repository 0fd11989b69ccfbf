"""What `store_int4` does to one page: widens its bounds, quantizes K anew and V of the new tokens."""

import triton
import triton.language as tl

from vllm_quest.kernels.triton.bounds import round_down, widen_bounds
from vllm_quest.kernels.triton.codes import (
    NO_FRACTION,
    TAGS,
    as_float,
    fine_codes,
    fraction,
    group_channels,
    load_residual,
    step_of,
    units_of,
)
from vllm_quest.kernels.triton.touched import find_new

__all__ = ["store_page"]

LARGEST = tl.constexpr(2.0**126)  # what larger elements are stored as: a range must be finite, too


@triton.jit
def _load_new(tensor, source, stride, channel, mask):
    """Elements of new tokens in float32, in the range that is stored; 0 elsewhere."""
    loaded = tl.load(tensor + source[:, None] * stride + channel[None, :], mask=mask, other=0.0)
    return tl.minimum(tl.maximum(loaded.to(tl.float32), -LARGEST), LARGEST)


@triton.jit
def _store_residual(residual, at, low, high, inside, row, residual_rows):
    rest = (low & 15) | ((high & 15) << 4)
    tl.store(residual + at, rest.to(tl.uint8), mask=inside & (row < residual_rows)[:, None])


@triton.jit
def _store_keys(
    key,
    codes,
    residual,
    bounds,
    bound_params,
    low_source,
    high_source,
    low_new,
    high_new,
    first,
    rest_end,
    tag,
    residual_rows,
    stride_key,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    HALF: tl.constexpr,
):
    """K of a page's new tokens beside the older ones, those before `first`, which are quantized anew.

    Tokens before `rest_end` have a residual, which is read; the page's own goes to `residual_rows` rows.
    """
    row = tl.arange(0, HALF)
    channel = tl.arange(0, HEAD_PAD)
    in_head = (channel < HEAD_SIZE)[None, :]
    at = row[:, None] * HEAD_SIZE + channel[None, :]
    low_old, high_old = (row < first)[:, None], (row + HALF < first)[:, None]
    # A high token is older only where the low one is.
    bytes = tl.load(codes + at, mask=low_old & in_head, other=0).to(tl.int32)
    rest = load_residual(residual + at, (row < rest_end)[:, None] & in_head)
    low = _load_new(key, low_source, stride_key, channel, low_new & in_head)
    high = _load_new(key, high_source, stride_key, channel, high_new & in_head)
    low_limit, high_limit = tl.where(low_new, low, float("inf")), tl.where(high_new, high, float("inf"))
    kmin = tl.min(tl.minimum(low_limit, high_limit), 0)
    low_limit, high_limit = tl.where(low_new, low, float("-inf")), tl.where(high_new, high, float("-inf"))
    kmax = tl.max(tl.maximum(low_limit, high_limit), 0)
    # From here on the page is written: `widen_bounds` waits until all threads have read.
    old_zero, old_max, zero, kmax = widen_bounds(
        bounds, bound_params, kmin, kmax, first > 0, channel, HEAD_SIZE
    )
    old_step = step_of(old_zero, old_max)[None, :]
    old_zero = old_zero[None, :]
    low_code = as_float(bytes & 15) + fraction(rest & 15)
    # The page's last token is never older than another one: its place, the tag's, is not read.
    high_code = as_float(bytes >> 4) + fraction(rest >> 4)
    low = tl.where(low_old, old_zero + old_step * low_code, low)
    high = tl.where(high_old, old_zero + old_step * high_code, high)
    step = step_of(zero, kmax)[None, :]
    low, high = fine_codes(low, zero[None, :], step), fine_codes(high, zero[None, :], step)
    inside = tl.broadcast_to(in_head, [HALF, HEAD_PAD])
    tl.store(codes + at, ((low >> 4) | (high & 240)).to(tl.uint8), mask=inside)
    high = tl.where((row == HALF - 1)[:, None], tag, high)
    _store_residual(residual, at, low, high, inside, row, residual_rows)


@triton.jit
def _value_codes(
    value, is_new, in_group, GROUPS_PAD: tl.constexpr, GROUP_PAD: tl.constexpr, GROUPS: tl.constexpr
):
    """8-bit codes of V tokens ``[n, GROUPS_PAD * GROUP_PAD]``, and words of their zero points and scales."""
    SHAPE: tl.constexpr = [value.shape[0], GROUPS_PAD, GROUP_PAD]
    low = tl.min(tl.where(in_group, value, float("inf")).reshape(SHAPE), 2)
    high = tl.max(tl.where(in_group, value, float("-inf")).reshape(SHAPE), 2)
    known = (tl.arange(0, GROUPS_PAD) < GROUPS)[None, :]
    zero = round_down(tl.where(known, low, 0.0))
    scale = -round_down(-step_of(zero, tl.where(known, high, 0.0)))
    codes = fine_codes(value.reshape(SHAPE), zero[:, :, None], scale[:, :, None]).reshape(value.shape)
    words = (zero.to(tl.int32, bitcast=True) >> 16) & 65535 | scale.to(tl.int32, bitcast=True)
    return codes, words, is_new & known


@triton.jit
def _store_values(
    value,
    codes,
    params,
    residual,
    low_source,
    high_source,
    low_new,
    high_new,
    first,
    rest_end,
    residual_rows,
    stride_value,
    HEAD_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HALF: tl.constexpr,
):
    """V of a page's new tokens beside the older ones, which stay as they are; see `_store_keys`."""
    row = tl.arange(0, HALF)
    channel, in_group = group_channels(GROUPS, HEAD_SIZE // GROUPS, GROUPS_PAD, GROUP_PAD)
    in_group = in_group[None, :]
    inside = tl.broadcast_to(in_group, [HALF, GROUPS_PAD * GROUP_PAD])
    at = row[:, None] * HEAD_SIZE + channel[None, :]
    bytes = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    rest = load_residual(residual + at, (row < rest_end)[:, None] & in_group)
    low = _load_new(value, low_source, stride_value, channel, low_new & in_group)
    high = _load_new(value, high_source, stride_value, channel, high_new & in_group)
    low, low_words, low_known = _value_codes(low, low_new, in_group, GROUPS_PAD, GROUP_PAD, GROUPS)
    high, high_words, high_known = _value_codes(high, high_new, in_group, GROUPS_PAD, GROUP_PAD, GROUPS)
    low_code, high_code = tl.where(low_new, low >> 4, bytes & 15), tl.where(high_new, high & 240, bytes & 240)
    old_rest = tl.where((row < first)[:, None], rest & 15, NO_FRACTION)
    low = tl.where(low_new, low, old_rest)
    old_rest = tl.where((row + HALF < first)[:, None], rest >> 4, NO_FRACTION)
    high = tl.where(high_new, high, old_rest)
    tl.debug_barrier()  # all threads have read
    tl.store(codes + at, (low_code | high_code).to(tl.uint8), mask=inside)
    _store_residual(residual, at, low, high, inside, row, residual_rows)
    params_at = row[:, None] * GROUPS + tl.arange(0, GROUPS_PAD)[None, :]
    tl.store(params + params_at, low_words, mask=low_known)
    tl.store(params + HALF * GROUPS + params_at, high_words, mask=high_known)


@triton.jit
def store_page(
    key,
    value,
    key_codes,
    key_residual,
    value_codes,
    value_params,
    value_residual,
    bounds,
    bound_params,
    slot_mapping,
    token,
    run,
    residual_rows,
    stride_key,
    stride_value,
    stride_block,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Stores the new tokens of the page that ends, in this call, with `token`.

    `run` is where the head's runs begin, in units of 16 bytes; `residual_rows` is half a page where the
    block's residuals are to be the page's, else 0.
    """
    HALF: tl.constexpr = PAGE_SIZE // 2
    slot = tl.load(slot_mapping + token)
    page = slot % BLOCK_SIZE // PAGE_SIZE
    run += slot // BLOCK_SIZE * stride_block
    row = tl.arange(0, HALF)
    back = slot % PAGE_SIZE - row
    low_source, low_new = find_new(slot_mapping, token, slot, back)
    high_source, high_new = find_new(slot_mapping, token, slot, back - HALF)
    first = tl.minimum(
        tl.min(tl.where(low_new, row, PAGE_SIZE), 0), tl.min(tl.where(high_new, row + HALF, PAGE_SIZE), 0)
    )
    low_new, high_new = low_new[:, None], high_new[:, None]
    key_residual += run * 16
    tag = (page % TAGS).to(tl.int32)
    found = tl.load(key_residual + (HALF - 1) * HEAD_SIZE).to(tl.int32) >> 4
    rest_end = tl.where(found == tag, first, 0)
    codes_at = run * 16 + page * (HALF * HEAD_SIZE)
    bounds += run * units_of(bounds) + page * (2 * HEAD_SIZE)
    if bound_params is not None:
        bound_params += run * 4 + page * 2
    _store_keys(
        key, key_codes + codes_at, key_residual, bounds, bound_params,
        low_source, high_source, low_new, high_new, first, rest_end, tag, residual_rows, stride_key,
        HEAD_SIZE, HEAD_PAD, HALF,
    )  # fmt: skip
    params = value_params + run * 4 + page * (PAGE_SIZE * GROUPS)
    _store_values(
        value, value_codes + codes_at, params, value_residual + run * 16,
        low_source, high_source, low_new, high_new, first, rest_end, residual_rows, stride_value,
        HEAD_SIZE, GROUPS, GROUPS_PAD, GROUP_PAD, HALF,
    )  # fmt: skip
