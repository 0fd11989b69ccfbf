"""A tile of attention over 4-bit pages: logits, softmax and weighted values; see `attend_int4`."""

import triton
import triton.language as tl

from vllm_quest.formats.int4.triton.structs import Softmax
from vllm_quest.kernels.triton.codes import (
    NO_FRACTION,
    STEP,
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


@triton.jit
def _load_residual(pointers, mask):
    """Residuals as words, uint16; outside `mask` of tokens without a fraction, as in `load_residual`."""
    return tl.where(mask, tl.load(pointers, mask=mask, other=0), NO_FRACTION * 0x1111).to(tl.uint16)


@triton.jit
def _meet_keys(
    query,
    run,
    page,
    is_read,
    cache,
    shape: tl.constexpr,
    DOT: tl.constexpr,
    PTX: tl.constexpr,
):
    """What a page's kmin and steps make of each row's query.

    Args:
        query: Below twice QUERY_SCALE.
        run: ``[M]``, of each row's page.
        page: ``[M]``, its number in the run.
        is_read: ``[M]``, which rows have a page.
        cache: Whose bounds are read.
        shape: Its shape.
        DOT: The type of the result.
        PTX: Whether NVIDIA's own instructions are used.

    Returns:
        The query times the steps of the page's codes, even and odd channels in DOT, up to a factor; the
        factor, and the query times kmin, ``[M]`` each.
    """
    WORDS: tl.constexpr = shape.HEAD_SIZE // 2
    word = tl.arange(0, query.even.shape[1])[None, :]
    loaded = is_read[:, None] & (word < WORDS)
    UNITS: tl.constexpr = 128 // cache.bounds.dtype.element_ty.primitive_bitwidth
    bound_row = cache.bounds + (run * UNITS + page * (2 * WORDS))[:, None] + word
    low = tl.load(bound_row, mask=loaded, other=0)
    high = tl.load(bound_row + WORDS, mask=loaded, other=0)
    if cache.bound_params is not None:
        pair = cache.bound_params + run * 4 + page * 2
        zero = tl.load(pair, mask=is_read, other=0.0)[:, None]
        scale = tl.load(pair + 1, mask=is_read, other=0.0)
        even, odd = floats_of(low, PTX)
        even, odd = zero + scale[:, None] * even, zero + scale[:, None] * odd
        offset = tl.sum(query.even * even + query.odd * odd, 1)
        even, odd = times_range(query.even, query.odd, low, high, DOT, PTX)
        return even, odd, scale * STEP, offset
    else:
        even, odd = split_words(low)
        even_max, odd_max = split_words(high)
        offset = tl.sum(query.even * even + query.odd * odd, 1)
        # Scaled before they are subtracted: the differences might not be finite.
        even, odd = even_max * STEP - even * STEP, odd_max * STEP - odd * STEP
        factor = power_of_two(tl.max(tl.maximum(even, odd), 1))
        even, odd = query.even * (even / factor[:, None]), query.odd * (odd / factor[:, None])
        return even.to(DOT), odd.to(DOT), factor, offset


@triton.jit
def attend_tile(
    query,
    softmax,
    cache,
    first_page,
    places,
    span,
    least_weight,
    shape: tl.constexpr,
    group: tl.constexpr,
    words: tl.constexpr,
    ROWS: tl.constexpr,
    VALUE_DOT: tl.constexpr,
    IS_FLOAT16: tl.constexpr,
    LAST: tl.constexpr,
):
    """The softmax so far, with the tokens of the list's pages from `first_page` on.

    All pages are full and without residuals, but for the LAST tile, which asks `span`.
    """
    GROUP: tl.constexpr = group.SIZE
    HEADS: tl.constexpr = group.PAD
    GROUPS: tl.constexpr = shape.GROUPS
    GROUPS_PAD: tl.constexpr = shape.GROUPS_PAD
    PAGE_SIZE: tl.constexpr = shape.PAGE_SIZE
    KEY_DOT: tl.constexpr = words.KEY_DOT
    PTX: tl.constexpr = words.PTX
    HALF: tl.constexpr = PAGE_SIZE // 2
    WORDS: tl.constexpr = shape.HEAD_SIZE // 2
    row = tl.arange(0, ROWS)
    half_row = row % HALF
    word_row = places.run * 8 + (places.page * HALF + half_row) * WORDS
    word = tl.arange(0, query.even.shape[1])[None, :]
    head = tl.arange(0, query.even.shape[0])
    own = (head // HEADS)[:, None] == (row // HALF)[None, :]  # each row meets the tokens of its page
    is_read = head // HEADS < ROWS // HALF
    if LAST:
        ordinal = first_page + row // HALF
        token = ordinal * PAGE_SIZE + half_row  # of the list
        low_seen, high_seen = token < span.tokens, token + HALF < span.tokens
        is_read &= first_page + head // HEADS < span.pages
    else:
        low_seen = tl.full([ROWS], True, tl.int1)
        high_seen = low_seen
    mask = low_seen[:, None] & (word < WORDS)
    codes = tl.load(cache.key_codes + word_row[:, None] + word, mask=mask, other=0)
    if LAST:
        has_residual = low_seen & (ordinal >= span.residual_start)
        residual_row = places.run * 8 + half_row * WORDS
        residual = cache.key_residual + residual_row[:, None] + word
        residual = _load_residual(residual, mask & has_residual[:, None])
        # The tag's place: the page's last token has 4 bits.
        has_tag = (half_row == HALF - 1)[:, None]
        residual = tl.where(has_tag, residual & 0x0F0F | (NO_FRACTION * 0x1010), residual)
        low_even, high_even, low_odd, high_odd = fine_codes_of(codes, residual, KEY_DOT)
    else:
        low_even, high_even, low_odd, high_odd = codes_of(codes, KEY_DOT, PTX)
    even, odd, factor, offset = _meet_keys(
        query, places.head_run, places.head_page, is_read, cache, shape, KEY_DOT, PTX
    )
    low_logits = tl.dot(even, tl.trans(low_even), input_precision="ieee")
    low_logits = tl.dot(odd, tl.trans(low_odd), low_logits, input_precision="ieee")
    high_logits = tl.dot(even, tl.trans(high_even), input_precision="ieee")
    high_logits = tl.dot(odd, tl.trans(high_odd), high_logits, input_precision="ieee")
    low_factor, high_factor = factor * query.logit_scale, factor * query.logit_scale
    if PTX and not LAST:
        low_factor *= LOW_UNIT
        high_factor *= HIGH_UNIT
    offset = (offset * query.logit_scale)[:, None]
    low_logits = low_logits * low_factor[:, None] + offset
    high_logits = high_logits * high_factor[:, None] + offset
    low_logits = tl.where(own & low_seen[None, :], low_logits, float("-inf"))  # [M, ROWS]
    high_logits = tl.where(own & high_seen[None, :], high_logits, float("-inf"))

    peak = tl.maximum(softmax.peak, tl.max(tl.maximum(low_logits, high_logits), 1))
    base = tl.where(peak == float("-inf"), 0.0, peak)
    low_weights, high_weights = tl.exp2(low_logits - base[:, None]), tl.exp2(high_logits - base[:, None])
    rescale = tl.exp2(softmax.peak - base)
    read = low_seen
    if least_weight is not None:
        in_group = (head % HEADS < GROUP)[:, None]
        low_read = tl.max(tl.where(in_group, low_weights, 0.0), 0) > least_weight
        high_read = tl.max(tl.where(in_group, high_weights, 0.0), 0) > least_weight
        low_weights = tl.where(low_read[None, :], low_weights, 0.0)
        high_weights = tl.where(high_read[None, :], high_weights, 0.0)
        read = low_seen & (low_read | high_read)
    norm = softmax.norm * rescale + tl.sum(low_weights + high_weights, 1)

    word, in_head = group_channels(GROUPS, WORDS // GROUPS, GROUPS_PAD, shape.CHANNELS_PAD // 2)
    mask = read[:, None] & in_head[None, :]
    codes = tl.load(cache.value_codes + word_row[:, None] + word[None, :], mask=mask, other=0)
    if LAST:
        residual = cache.value_residual + residual_row[:, None] + word[None, :]
        residual = _load_residual(residual, mask & has_residual[:, None])
        low_even, high_even, low_odd, high_odd = fine_codes_of(codes, residual, VALUE_DOT)
    else:
        low_even, high_even, low_odd, high_odd = codes_of(codes, VALUE_DOT, PTX)
    params = cache.value_params + places.run * 4 + (places.page * PAGE_SIZE + half_row) * GROUPS
    zeros = softmax.zeros
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
        value_group = tl.arange(0, GROUPS_PAD)[None, :]
        params = params[:, None] + value_group
        mask = low_seen[:, None] & (value_group < GROUPS)
        low_even = limited(read_values(low_even.to(tl.float32), params, mask, GROUPS_PAD), IS_FLOAT16)
        low_odd = limited(read_values(low_odd.to(tl.float32), params, mask, GROUPS_PAD), IS_FLOAT16)
        params += HALF * GROUPS
        mask = high_seen[:, None] & (value_group < GROUPS)
        high_even = limited(read_values(high_even.to(tl.float32), params, mask, GROUPS_PAD), IS_FLOAT16)
        high_odd = limited(read_values(high_odd.to(tl.float32), params, mask, GROUPS_PAD), IS_FLOAT16)
    low_weights, high_weights = low_weights.to(VALUE_DOT), high_weights.to(VALUE_DOT)
    acc_even, acc_odd = softmax.even * rescale[:, None], softmax.odd * rescale[:, None]
    acc_even = tl.dot(low_weights, low_even.to(VALUE_DOT), acc_even, input_precision="ieee")
    acc_even = tl.dot(high_weights, high_even.to(VALUE_DOT), acc_even, input_precision="ieee")
    acc_odd = tl.dot(low_weights, low_odd.to(VALUE_DOT), acc_odd, input_precision="ieee")
    acc_odd = tl.dot(high_weights, high_odd.to(VALUE_DOT), acc_odd, input_precision="ieee")
    return Softmax(acc_even, acc_odd, peak, norm, zeros)
