"""What `store_int4` does to one page: widens its bounds, quantizes K anew and V of the new tokens."""

import triton
import triton.language as tl

from vllm_quest.formats.int4 import reference
from vllm_quest.formats.int4.triton.structs import Int4Pages, NewTokens, Residual
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

LARGEST = tl.constexpr(reference.LARGEST)


@triton.jit
def _load_new(tensor, source, channel, mask):
    """Elements of new tokens in float32, in the range that is stored; 0 elsewhere."""
    loaded = tl.load(
        tensor.data + source[:, None] * tensor.stride_row + channel[None, :], mask=mask, other=0.0
    )
    return tl.minimum(tl.maximum(loaded.to(tl.float32), -LARGEST), LARGEST)


@triton.jit
def _store_residual(pointers, low, high, inside, row, rows):
    residual = (low & 15) | ((high & 15) << 4)
    tl.store(pointers, residual.to(tl.uint8), mask=inside & (row < rows)[:, None])


@triton.jit
def _store_keys(key, page, new, first, owned, shape: tl.constexpr):
    """K of a page's new tokens beside the older ones, those before `first`, which are quantized anew.

    All pointers of `page` are at the page's part; `owned` says which of the block's residuals are its own.
    """
    HEAD_SIZE: tl.constexpr = shape.HEAD_SIZE
    HEAD_PAD: tl.constexpr = shape.HEAD_PAD
    HALF: tl.constexpr = shape.PAGE_SIZE // 2
    row = tl.arange(0, HALF)
    channel = tl.arange(0, HEAD_PAD)
    in_head = (channel < HEAD_SIZE)[None, :]
    at = row[:, None] * HEAD_SIZE + channel[None, :]
    low_old, high_old = (row < first)[:, None], (row + HALF < first)[:, None]
    # A high token is older only where the low one is.
    bytes = tl.load(page.key_codes + at, mask=low_old & in_head, other=0).to(tl.int32)
    residual = load_residual(page.key_residual + at, (row < owned.end)[:, None] & in_head)
    low = _load_new(key, new.low_source, channel, new.low & in_head)
    high = _load_new(key, new.high_source, channel, new.high & in_head)
    low_limit, high_limit = tl.where(new.low, low, float("inf")), tl.where(new.high, high, float("inf"))
    kmin = tl.min(tl.minimum(low_limit, high_limit), 0)
    low_limit, high_limit = tl.where(new.low, low, float("-inf")), tl.where(new.high, high, float("-inf"))
    kmax = tl.max(tl.maximum(low_limit, high_limit), 0)
    # From here on the page is written: `widen_bounds` waits until all threads have read.
    old_zero, old_max, zero, kmax = widen_bounds(
        page.bounds, page.bound_params, kmin, kmax, first > 0, channel, HEAD_SIZE
    )
    old_step = step_of(old_zero, old_max)[None, :]
    old_zero = old_zero[None, :]
    low_code = as_float(bytes & 15) + fraction(residual & 15)
    # The page's last token is never older than another one: its place, the tag's, is not read.
    high_code = as_float(bytes >> 4) + fraction(residual >> 4)
    low = tl.where(low_old, old_zero + old_step * low_code, low)
    high = tl.where(high_old, old_zero + old_step * high_code, high)
    step = step_of(zero, kmax)[None, :]
    low, high = fine_codes(low, zero[None, :], step), fine_codes(high, zero[None, :], step)
    inside = tl.broadcast_to(in_head, [HALF, HEAD_PAD])
    tl.store(page.key_codes + at, ((low >> 4) | (high & 240)).to(tl.uint8), mask=inside)
    high = tl.where((row == HALF - 1)[:, None], owned.tag, high)
    _store_residual(page.key_residual + at, low, high, inside, row, owned.rows)


@triton.jit
def _value_codes(value, is_new, in_group, shape: tl.constexpr):
    """8-bit codes of V tokens ``[n, GROUPS_PAD * CHANNELS_PAD]``, and words of zero points and scales."""
    GROUPS_PAD: tl.constexpr = shape.GROUPS_PAD
    CHANNELS_PAD: tl.constexpr = shape.CHANNELS_PAD
    SHAPE: tl.constexpr = [value.shape[0], GROUPS_PAD, CHANNELS_PAD]
    low = tl.min(tl.where(in_group, value, float("inf")).reshape(SHAPE), 2)
    high = tl.max(tl.where(in_group, value, float("-inf")).reshape(SHAPE), 2)
    known = (tl.arange(0, GROUPS_PAD) < shape.GROUPS)[None, :]
    zero = round_down(tl.where(known, low, 0.0))
    scale = -round_down(-step_of(zero, tl.where(known, high, 0.0)))
    codes = fine_codes(value.reshape(SHAPE), zero[:, :, None], scale[:, :, None]).reshape(value.shape)
    words = (zero.to(tl.int32, bitcast=True) >> 16) & 65535 | scale.to(tl.int32, bitcast=True)
    return codes, words, is_new & known


@triton.jit
def _store_values(value, page, new, first, owned, shape: tl.constexpr):
    """V of a page's new tokens beside the older ones, which stay as they are; see `_store_keys`."""
    HEAD_SIZE: tl.constexpr = shape.HEAD_SIZE
    GROUPS: tl.constexpr = shape.GROUPS
    GROUPS_PAD: tl.constexpr = shape.GROUPS_PAD
    CHANNELS_PAD: tl.constexpr = shape.CHANNELS_PAD
    HALF: tl.constexpr = shape.PAGE_SIZE // 2
    row = tl.arange(0, HALF)
    channel, in_group = group_channels(GROUPS, HEAD_SIZE // GROUPS, GROUPS_PAD, CHANNELS_PAD)
    in_group = in_group[None, :]
    inside = tl.broadcast_to(in_group, [HALF, GROUPS_PAD * CHANNELS_PAD])
    at = row[:, None] * HEAD_SIZE + channel[None, :]
    bytes = tl.load(page.value_codes + at, mask=inside, other=0).to(tl.int32)
    residual = load_residual(page.value_residual + at, (row < owned.end)[:, None] & in_group)
    low = _load_new(value, new.low_source, channel, new.low & in_group)
    high = _load_new(value, new.high_source, channel, new.high & in_group)
    low, low_words, low_known = _value_codes(low, new.low, in_group, shape)
    high, high_words, high_known = _value_codes(high, new.high, in_group, shape)
    low_code, high_code = tl.where(new.low, low >> 4, bytes & 15), tl.where(new.high, high & 240, bytes & 240)
    old_residual = tl.where((row < first)[:, None], residual & 15, NO_FRACTION)
    low = tl.where(new.low, low, old_residual)
    old_residual = tl.where((row + HALF < first)[:, None], residual >> 4, NO_FRACTION)
    high = tl.where(new.high, high, old_residual)
    tl.debug_barrier()  # all threads have read
    tl.store(page.value_codes + at, (low_code | high_code).to(tl.uint8), mask=inside)
    _store_residual(page.value_residual + at, low, high, inside, row, owned.rows)
    params_at = row[:, None] * GROUPS + tl.arange(0, GROUPS_PAD)[None, :]
    tl.store(page.value_params + params_at, low_words, mask=low_known)
    tl.store(page.value_params + HALF * GROUPS + params_at, high_words, mask=high_known)


@triton.jit
def store_page(key, value, cache, slot_mapping, token, run, residual_rows, shape: tl.constexpr):
    """Stores the new tokens of the page that ends, in this call, with `token`.

    `run` is where the head's runs begin, in units of 16 bytes; `residual_rows` is half a page where the
    block's residuals are to be the page's, else 0.
    """
    HEAD_SIZE: tl.constexpr = shape.HEAD_SIZE
    BLOCK_SIZE: tl.constexpr = shape.BLOCK_SIZE
    PAGE_SIZE: tl.constexpr = shape.PAGE_SIZE
    HALF: tl.constexpr = PAGE_SIZE // 2
    slot = tl.load(slot_mapping + token)
    page = slot % BLOCK_SIZE // PAGE_SIZE
    run += slot // BLOCK_SIZE * cache.stride_block
    row = tl.arange(0, HALF)
    back = slot % PAGE_SIZE - row
    low_source, low_new = find_new(slot_mapping, token, slot, back)
    high_source, high_new = find_new(slot_mapping, token, slot, back - HALF)
    first = tl.minimum(
        tl.min(tl.where(low_new, row, PAGE_SIZE), 0), tl.min(tl.where(high_new, row + HALF, PAGE_SIZE), 0)
    )
    new = NewTokens(low_source, high_source, low_new[:, None], high_new[:, None])
    key_residual = cache.key_residual + run * 16
    tag = (page % TAGS).to(tl.int32)
    found = tl.load(key_residual + (HALF - 1) * HEAD_SIZE).to(tl.int32) >> 4
    owned = Residual(end=tl.where(found == tag, first, 0), rows=residual_rows, tag=tag)
    codes_at = run * 16 + page * (HALF * HEAD_SIZE)
    bound_params = cache.bound_params
    if bound_params is not None:
        bound_params += run * 4 + page * 2
    parts = Int4Pages(
        key_codes=cache.key_codes + codes_at,
        key_residual=key_residual,
        value_codes=cache.value_codes + codes_at,
        value_params=cache.value_params + run * 4 + page * (PAGE_SIZE * shape.GROUPS),
        value_residual=cache.value_residual + run * 16,
        bounds=cache.bounds + (run * units_of(cache.bounds) + page * (2 * HEAD_SIZE)),
        bound_params=bound_params,
        stride_block=cache.stride_block,
        stride_kv_head=cache.stride_kv_head,
    )
    _store_keys(key, parts, new, first, owned, shape)
    _store_values(value, parts, new, first, owned, shape)
