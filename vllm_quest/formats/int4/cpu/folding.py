"""How queries and weights take up the parameters of int4 pages, so that attention multiplies codes only.

K is ``zero + step * code``: q . k is q . zero plus (q * step) . code. V is ``zero + scale * code`` per token
and group of channels: its weights become p * scale, and the sum of p * zero is added. The page that is being
filled has residuals, which count sixteenths of a step from -8 on.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from vllm_quest.formats.int4 import reference
from vllm_quest.formats.int4.cpu.nibbles import TAGS, load_words
from vllm_quest.kernels.cpu.memory import advance, get, load, load_like, put, store
from vllm_quest.kernels.cpu.simd import (
    add,
    first_lanes,
    multiply,
    splat,
    splat_like,
    subtract,
    sum_tile,
    zeros,
)

LANES = 16
STEP = np.float32(1 / reference.STEPS)
PART = np.float32(1 / reference.FINE)  # of a step, in which a residual counts
NO_FRACTION = np.float32(reference.NO_FRACTION)


@njit(error_model="numpy")
def fold_keys(q, group, head_size, bounds, pair, coded, steps, zero_logits):
    """The queries times each channel's step, and their products with the zero points of one page."""
    for g in range(group):
        total = zeros(1, 1, LANES)
        for channel in range(0, head_size, LANES):
            zero = load(advance(bounds, channel), LANES)
            top = load(advance(bounds, head_size + channel), LANES)
            if coded:
                offset, scale = splat(get(pair, 0), LANES), splat(get(pair, 1), LANES)
                zero, top = add(offset, multiply(scale, zero)), add(offset, multiply(scale, top))
            # Each by itself: their difference may be beyond float32.
            step = subtract(multiply(top, splat(STEP, LANES)), multiply(zero, splat(STEP, LANES)))
            part = load(advance(q, g * head_size + channel), LANES)
            store(advance(steps, g * head_size + channel), 0, multiply(part, step))
            total = add(total, multiply(part, zero))
        put(zero_logits, g, sum_tile(total))


@njit(error_model="numpy")
def fold_key_residual(steps, group, head_size, parts, zero_logits, no_parts):
    """The parts of the steps that residuals count, and what a residual of 8, which is none, would add."""
    for g in range(group):
        total = zeros(1, 1, LANES)
        for channel in range(g * head_size, (g + 1) * head_size, LANES):
            part = multiply(load(advance(steps, channel), LANES), splat(PART, LANES))
            store(advance(parts, channel), 0, part)
            total = add(total, part)
        put(no_parts, g, sum_tile(total) * NO_FRACTION)
        put(zero_logits, g, get(zero_logits, g) - get(no_parts, g))


@njit(error_model="numpy")
def forget_tag(last_token, stride, group, page, no_parts):
    """Makes the logits of a page's last token what they are without a residual: there stands the page."""
    for g in range(group):
        no_part = get(no_parts, g) * (np.float32(1) - np.float32(page % TAGS) / NO_FRACTION)
        put(last_token, g * stride, get(last_token, g * stride) + no_part)


@njit(error_model="numpy")
def fold_values(
    weights, stride, group, params, value_group, groups, page_size, seen, folded, zero_sums, like, lanes
):
    """A page's weights times the scales of one group of channels, and adds the weights times zero points."""
    for token in range(0, page_size, lanes):
        pairs = advance(params, 2 * (token * groups + value_group))
        # What was never written may be NaN.
        zero = first_lanes(load_words(pairs, groups, False, like), seen - token, np.float32(0))
        scale = first_lanes(load_words(pairs, groups, True, like), seen - token, np.float32(0))
        for g in range(group):
            weight = load_like(advance(weights, g * stride + token), like)
            store(advance(folded, g * stride + token), 0, multiply(weight, scale))
            put(zero_sums, g, get(zero_sums, g) + sum_tile(multiply(weight, zero)))


@njit(error_model="numpy")
def fold_value_residual(folded, stride, group, page_size, fine_weights, zero_sums, like, lanes):
    """What `fold_values` made of one page's weights in parts of a step, ``[group, S]``, for its residual."""
    for token in range(0, page_size, lanes):
        for g in range(group):
            weight = load_like(advance(folded, g * stride + token), like)
            part = multiply(weight, splat_like(PART, weight))
            store(advance(fine_weights, g * page_size + token), 0, part)
            put(zero_sums, g, get(zero_sums, g) - sum_tile(part) * NO_FRACTION)
