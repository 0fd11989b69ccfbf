"""What the attention kernels share: which pages a row reads, and a softmax in float32 that goes on by tiles.

A tile is the logits, in base 2, and then the weights of some tokens: `group` rows, `stride` elements apart,
of whole vectors. Per query head there are the largest logit so far, and relative to it the sum of the weights
and the weighted sum of V.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from vllm_quest.kernels.cpu.memory import advance, get, load, put, store
from vllm_quest.kernels.cpu.rounding import where_above
from vllm_quest.kernels.cpu.simd import (
    add,
    exp2,
    max_lane,
    maximum,
    multiply,
    splat,
    subtract,
    sum_tile,
    zeros,
)

LANES = 16
NEVER = np.float32(-np.inf)


@njit(error_model="numpy")
def pages_to_read(seq_len, page_size, listed, every):
    """Entries of a row's list of pages; without a list, pages of its context."""
    return -(-seq_len // page_size) if every else listed


@njit(error_model="numpy")
def page_at(indices, place, every):
    """An entry of a row's list of pages; without a list, the pages in order."""
    return place if every else get(indices, place)


@njit(error_model="numpy")
def visible_tokens(page, page_size, seq_len):
    """How many tokens of the context a page holds; 0 where the list names no page."""
    return max(0, min(page_size, seq_len - page * page_size)) if page >= 0 else 0


@njit(error_model="numpy")
def scaled(source, target, head_size, factor):
    """Writes the vector at `source`, multiplied by `factor`, to `target`."""
    for channel in range(0, head_size, LANES):
        values = multiply(load(advance(source, channel), LANES), splat(factor, LANES))
        store(advance(target, channel), 0, values)


@njit(error_model="numpy")
def begin(query, query_head, group, head_size, factor, q, weighted, tops, sums):
    """Reads a group's queries, multiplied by `factor`, and starts its softmax."""
    for g in range(group):
        put(tops, g, NEVER)
        put(sums, g, np.float32(0))
        scaled(advance(query, g * query_head), advance(q, g * head_size), head_size, factor)
        for channel in range(0, head_size, LANES):
            store(advance(weighted, g * head_size + channel), 0, zeros(1, 1, LANES))


@njit(error_model="numpy")
def hide(logits, stride, group, first, last):
    """Takes tokens of a tile out of the softmax."""
    for token in range(first, last):
        for g in range(group):
            put(logits, g * stride + token, NEVER)


@njit(error_model="numpy")
def raise_tops(logits, stride, tokens, group, head_size, tops, sums, weighted):
    """Takes the tile's largest logits into account: what was summed up before shrinks."""
    for g in range(group):
        highest = splat(get(tops, g), LANES)
        for token in range(0, tokens, LANES):
            highest = maximum(highest, load(advance(logits, g * stride + token), LANES))
        top = max_lane(highest)
        if top > get(tops, g):
            shrink = max_lane(exp2(splat(get(tops, g) - top, LANES)))
            put(tops, g, top)
            put(sums, g, get(sums, g) * shrink)
            head_out = advance(weighted, g * head_size)
            scaled(head_out, head_out, head_size, shrink)


@njit(error_model="numpy")
def hide_far(logits, stride, tokens, group, tops, farthest, nearness):
    """Hides tokens that are `farthest` or more below the top in every head; writes how near each came."""
    for token in range(0, tokens, LANES):
        near = splat(NEVER, LANES)
        for g in range(group):
            logit = load(advance(logits, g * stride + token), LANES)
            near = maximum(near, subtract(logit, splat(get(tops, g), LANES)))
        store(advance(nearness, token), 0, near)
        for g in range(group):
            place = advance(logits, g * stride + token)
            kept = where_above(near, splat(-farthest, LANES), load(place, LANES), splat(NEVER, LANES))
            store(place, 0, kept)


@njit(error_model="numpy")
def to_weights(logits, stride, tokens, group, tops, sums):
    """Turns the logits of a tile into weights."""
    for g in range(group):
        top = splat(get(tops, g), LANES)
        total = zeros(1, 1, LANES)
        for token in range(0, tokens, LANES):
            place = advance(logits, g * stride + token)
            weight = exp2(subtract(load(place, LANES), top))
            store(place, 0, weight)
            total = add(total, weight)
        put(sums, g, get(sums, g) + sum_tile(total))


@njit(error_model="numpy")
def keep(weighted, tops, sums, group, head_size, partial):
    """Leaves a chunk's result, ``[group, D + 2]``, for `merge`."""
    for g in range(group):
        part = advance(partial, g * (head_size + 2))
        scaled(advance(weighted, g * head_size), part, head_size, np.float32(1))
        put(part, head_size, get(tops, g))
        put(part, head_size + 1, get(sums, g))


@njit(error_model="numpy")
def merge(partial, chunks, group, target, head_size):
    """Writes a group's outputs from its chunks' results; 0 if they saw no token."""
    for g in range(group):
        stride = group * (head_size + 2)
        parts, out = advance(partial, g * (head_size + 2)), advance(target, g * head_size)
        top = NEVER
        for chunk in range(chunks):
            top = max(top, get(parts, chunk * stride + head_size))
        total = np.float32(0)
        for chunk in range(chunks):
            part = advance(parts, chunk * stride)
            total += max_lane(exp2(splat(get(part, head_size) - top, LANES))) * get(part, head_size + 1)
        share = splat(np.float32(1) / total if total > 0 else np.float32(0), LANES)
        for channel in range(0, head_size, LANES):
            value = zeros(1, 1, LANES)
            for chunk in range(chunks):
                part = advance(parts, chunk * stride)
                weight = exp2(splat(get(part, head_size) - top, LANES))
                value = add(value, multiply(weight, load(advance(part, channel), LANES)))
            store(advance(out, channel), 0, multiply(value, share))
