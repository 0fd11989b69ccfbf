"""A tile of attention over 4-bit pages: logits, softmax and weighted values; see `attend_int4`."""

import triton
import triton.language as tl

from vllm_quest.kernels.triton.codes import (
    NO_FRACTION,
    group_channels,
    limited,
    power_of_two,
    read_values,
    split_words,
)
from vllm_quest.kernels.triton.words import (
    HIGH_UNIT,
    LOW_UNIT,
    codes_of,
    fine_codes_of,
    floats_of,
    times_range,
)

__all__ = ["attend_tile"]

PART = tl.constexpr(1 / 15)  # of a range, a quantizer's step


@triton.jit
def _load_rest(pointers, mask):
    """Residual words, uint16; outside `mask` those of tokens without a fraction, as in `load_residual`."""
    return tl.where(mask, tl.load(pointers, mask=mask, other=0), NO_FRACTION * 0x1111).to(tl.uint16)


@triton.jit
def _meet_keys(
    q_even,
    q_odd,
    run,
    page,
    is_read,
    bounds,
    bound_params,
    HEAD_SIZE: tl.constexpr,
    DOT: tl.constexpr,
    PTX: tl.constexpr,
):
    """What a page's kmin and steps make of each row's query.

    Args:
        q_even: ``[M, HEAD_PAD / 2]`` float32, below twice QUERY_SCALE; `q_odd` likewise.
        run: ``[M]``, of each row's page.
        page: ``[M]``, its number in the run.
        is_read: ``[M]``, which rows have a page.

    Returns:
        The query times the steps of the page's codes, even and odd channels in DOT, up to a factor; the
        factor, and the query times kmin, ``[M]`` each.
    """
    word = tl.arange(0, q_even.shape[1])[None, :]
    WORDS: tl.constexpr = HEAD_SIZE // 2
    loaded = is_read[:, None] & (word < WORDS)
    UNITS: tl.constexpr = 128 // bounds.dtype.element_ty.primitive_bitwidth
    bound_row = bounds + (run * UNITS + page * (2 * WORDS))[:, None] + word
    low = tl.load(bound_row, mask=loaded, other=0)
    high = tl.load(bound_row + WORDS, mask=loaded, other=0)
    if bound_params is not None:
        pair = bound_params + run * 4 + page * 2
        zero = tl.load(pair, mask=is_read, other=0.0)[:, None]
        scale = tl.load(pair + 1, mask=is_read, other=0.0)
        even, odd = floats_of(low, PTX)
        even, odd = zero + scale[:, None] * even, zero + scale[:, None] * odd
        offset = tl.sum(q_even * even + q_odd * odd, 1)
        even, odd = times_range(q_even, q_odd, low, high, DOT, PTX)
        return even, odd, scale * PART, offset
    else:
        even, odd = split_words(low)
        even_max, odd_max = split_words(high)
        offset = tl.sum(q_even * even + q_odd * odd, 1)
        # Scaled before they are subtracted: the differences might not be finite.
        even, odd = even_max * PART - even * PART, odd_max * PART - odd * PART
        factor = power_of_two(tl.max(tl.maximum(even, odd), 1))
        even, odd = q_even * (even / factor[:, None]), q_odd * (odd / factor[:, None])
        return even.to(DOT), odd.to(DOT), factor, offset


@triton.jit
def attend_tile(
    q_even,
    q_odd,
    logit_scale,
    acc_even,
    acc_odd,
    peak,
    norm,
    zeros,
    first_page,
    run,
    page,
    head_run,
    head_page,
    pages,
    seen,
    residual_start,
    key_codes,
    key_residual,
    value_codes,
    value_params,
    value_residual,
    bounds,
    bound_params,
    least_weight,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEY_DOT: tl.constexpr,
    VALUE_DOT: tl.constexpr,
    IS_FLOAT16: tl.constexpr,
    PTX: tl.constexpr,
    LAST: tl.constexpr,
):
    """The softmax so far, with the tokens of the list's pages from `first_page` on.

    Logits are products with the query times `logit_scale`, ``[M]``. `run` and `page` are of each byte row,
    ``[ROWS]``, `head_run` and `head_page` of each row of the query. All pages are full, but for the LAST
    tile: the list has `pages`, of whose tokens `seen` are visible; from `residual_start` on with residuals.
    """
    HALF: tl.constexpr = PAGE_SIZE // 2
    WORDS: tl.constexpr = HEAD_SIZE // 2
    row = tl.arange(0, ROWS)
    half_row = row % HALF
    word_row = run * 8 + (page * HALF + half_row) * WORDS
    word = tl.arange(0, q_even.shape[1])[None, :]
    head = tl.arange(0, q_even.shape[0])
    own = (head // HEADS)[:, None] == (row // HALF)[None, :]  # each row meets the tokens of its page
    is_read = head // HEADS < ROWS // HALF
    if LAST:
        ordinal = first_page + row // HALF
        token = ordinal * PAGE_SIZE + half_row  # of the list
        low_seen, high_seen = token < seen, token + HALF < seen
        is_read &= first_page + head // HEADS < pages
    else:
        low_seen = tl.full([ROWS], True, tl.int1)
        high_seen = low_seen
    mask = low_seen[:, None] & (word < WORDS)
    words = tl.load(key_codes + word_row[:, None] + word, mask=mask, other=0)
    if LAST:
        has_rest = low_seen & (ordinal >= residual_start)
        rest_row = run * 8 + half_row * WORDS
        rest = _load_rest(key_residual + rest_row[:, None] + word, mask & has_rest[:, None])
        # The tag's place: the page's last token has 4 bits.
        rest = tl.where((half_row == HALF - 1)[:, None], rest & 0x0F0F | (NO_FRACTION * 0x1010), rest)
        low_even, high_even, low_odd, high_odd = fine_codes_of(words, rest, KEY_DOT)
    else:
        low_even, high_even, low_odd, high_odd = codes_of(words, KEY_DOT, PTX)
    even, odd, factor, offset = _meet_keys(
        q_even, q_odd, head_run, head_page, is_read, bounds, bound_params, HEAD_SIZE, KEY_DOT, PTX
    )
    low_logits = tl.dot(even, tl.trans(low_even), input_precision="ieee")
    low_logits = tl.dot(odd, tl.trans(low_odd), low_logits, input_precision="ieee")
    high_logits = tl.dot(even, tl.trans(high_even), input_precision="ieee")
    high_logits = tl.dot(odd, tl.trans(high_odd), high_logits, input_precision="ieee")
    low_factor, high_factor = factor * logit_scale, factor * logit_scale
    if PTX and not LAST:
        low_factor *= LOW_UNIT
        high_factor *= HIGH_UNIT
    offset = (offset * logit_scale)[:, None]
    low_logits = low_logits * low_factor[:, None] + offset
    high_logits = high_logits * high_factor[:, None] + offset
    low_logits = tl.where(own & low_seen[None, :], low_logits, float("-inf"))  # [M, ROWS]
    high_logits = tl.where(own & high_seen[None, :], high_logits, float("-inf"))

    new_peak = tl.maximum(peak, tl.max(tl.maximum(low_logits, high_logits), 1))
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    low_weights, high_weights = tl.exp2(low_logits - base[:, None]), tl.exp2(high_logits - base[:, None])
    rescale = tl.exp2(peak - base)
    read = low_seen
    if least_weight is not None:
        in_group = (head % HEADS < GROUP)[:, None]
        low_read = tl.max(tl.where(in_group, low_weights, 0.0), 0) > least_weight
        high_read = tl.max(tl.where(in_group, high_weights, 0.0), 0) > least_weight
        low_weights = tl.where(low_read[None, :], low_weights, 0.0)
        high_weights = tl.where(high_read[None, :], high_weights, 0.0)
        read = low_seen & (low_read | high_read)
    norm = norm * rescale + tl.sum(low_weights + high_weights, 1)

    word, in_head = group_channels(GROUPS, WORDS // GROUPS, GROUPS_PAD, GROUP_PAD // 2)
    mask = read[:, None] & in_head[None, :]
    words = tl.load(value_codes + word_row[:, None] + word[None, :], mask=mask, other=0)
    if LAST:
        rest = value_residual + rest_row[:, None] + word[None, :]
        rest = _load_rest(rest, mask & has_rest[:, None])
        low_even, high_even, low_odd, high_odd = fine_codes_of(words, rest, VALUE_DOT)
    else:
        low_even, high_even, low_odd, high_odd = codes_of(words, VALUE_DOT, PTX)
    params = value_params + run * 4 + (page * PAGE_SIZE + half_row) * GROUPS
    if GROUPS == 1:
        low_zero, low_scale = split_words(tl.load(params, mask=low_seen, other=0))
        high_zero, high_scale = split_words(tl.load(params + HALF, mask=high_seen, other=0))
        points = low_weights * low_zero[None, :] + high_weights * high_zero[None, :]
        zeros = zeros * rescale + tl.sum(points, 1)
        if PTX and IS_FLOAT16 and not LAST:
            high_scale *= HIGH_UNIT / LOW_UNIT
        low_weights *= low_scale[None, :]
        high_weights *= high_scale[None, :]
    else:
        if PTX and IS_FLOAT16 and not LAST:
            low_even, low_odd = low_even.to(tl.float32) * LOW_UNIT, low_odd.to(tl.float32) * LOW_UNIT
            high_even, high_odd = high_even.to(tl.float32) * HIGH_UNIT, high_odd.to(tl.float32) * HIGH_UNIT
        group = tl.arange(0, GROUPS_PAD)[None, :]
        params = params[:, None] + group
        mask = low_seen[:, None] & (group < GROUPS)
        low_even = limited(read_values(low_even.to(tl.float32), params, mask, GROUPS_PAD), IS_FLOAT16)
        low_odd = limited(read_values(low_odd.to(tl.float32), params, mask, GROUPS_PAD), IS_FLOAT16)
        params += HALF * GROUPS
        mask = high_seen[:, None] & (group < GROUPS)
        high_even = limited(read_values(high_even.to(tl.float32), params, mask, GROUPS_PAD), IS_FLOAT16)
        high_odd = limited(read_values(high_odd.to(tl.float32), params, mask, GROUPS_PAD), IS_FLOAT16)
    low_weights, high_weights = low_weights.to(VALUE_DOT), high_weights.to(VALUE_DOT)
    acc_even, acc_odd = acc_even * rescale[:, None], acc_odd * rescale[:, None]
    acc_even = tl.dot(low_weights, low_even.to(VALUE_DOT), acc_even, input_precision="ieee")
    acc_even = tl.dot(high_weights, high_even.to(VALUE_DOT), acc_even, input_precision="ieee")
    acc_odd = tl.dot(low_weights, low_odd.to(VALUE_DOT), acc_odd, input_precision="ieee")
    acc_odd = tl.dot(high_weights, high_odd.to(VALUE_DOT), acc_odd, input_precision="ieee")
    return acc_even, acc_odd, new_peak, norm, zeros
