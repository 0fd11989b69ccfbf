"""kmin and kmax of one page as compiled kernels read and write them; `kernels.bounds` has the rules.

Pages' bounds are ``[2, D]``: kmin, then kmax. In a kernel they are float32 on its stack.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from vllm_quest.kernels import bounds as reference
from vllm_quest.kernels.cpu.memory import advance, get, load, put
from vllm_quest.kernels.cpu.memory import store as store_tile
from vllm_quest.kernels.cpu.rounding import bfloat16_above, bfloat16_below, ceil, floor, min_lane, where_equal
from vllm_quest.kernels.cpu.simd import add, max_lane, maximum, minimum, multiply, splat, splat_like, subtract

LANES = 16
CODES = np.float32(reference.CODES)
LARGEST = np.float32(reference.FLOAT32_MAX)
TINY = np.float32(reference.TINY)
LARGER = np.float32(reference.LARGER)


@njit(error_model="numpy")
def clear(bounds, head_size):
    """Bounds of no key."""
    for channel in range(0, head_size, LANES):
        store_tile(advance(bounds, channel), 0, splat(np.float32(np.inf), LANES))
        store_tile(advance(bounds, head_size + channel), 0, splat(np.float32(-np.inf), LANES))


@njit(error_model="numpy")
def read_bounds(values, params, coded, head_size, bounds):
    """Reads stored bounds; with `coded` they are codes with an offset and a scale at `params`."""
    for channel in range(0, 2 * head_size, LANES):
        bound = load(advance(values, channel), LANES)
        if coded:
            bound = add(splat(get(params, 0), LANES), multiply(splat(get(params, 1), LANES), bound))
        store_tile(advance(bounds, channel), 0, bound)


@njit(error_model="numpy")
def widen(bounds, kmin, kmax, head_size):
    """Makes `bounds` include two keys."""
    for channel in range(0, head_size, LANES):
        low, high = advance(bounds, channel), advance(bounds, head_size + channel)
        store_tile(low, 0, minimum(load(low, LANES), load(advance(kmin, channel), LANES)))
        store_tile(high, 0, maximum(load(high, LANES), load(advance(kmax, channel), LANES)))


@njit(error_model="numpy")
def write_rounded(values, head_size, bounds):
    """Writes bounds to the bfloat16 `values`, rounded outward."""
    for channel in range(0, head_size, LANES):
        low, high = load(advance(bounds, channel), LANES), load(advance(bounds, head_size + channel), LANES)
        store_tile(advance(values, channel), 0, bfloat16_below(low))
        store_tile(advance(values, head_size + channel), 0, bfloat16_above(high))


@njit(error_model="numpy")
def clamped(values, low, high):
    """The values between two limits."""
    return maximum(minimum(values, splat_like(high, values)), splat_like(low, values))


@njit(error_model="numpy")
def write_codes(values, params, head_size, bounds, old, goes_on):
    """Writes bounds as codes, rounded outward; where the page goes on, `old` is what was stored before."""
    lowest, highest = splat(np.float32(np.inf), LANES), splat(np.float32(-np.inf), LANES)
    for channel in range(0, head_size, LANES):
        low, high = advance(bounds, channel), advance(bounds, head_size + channel)
        store_tile(low, 0, clamped(load(low, LANES), -LARGEST, LARGEST))
        store_tile(high, 0, clamped(load(high, LANES), -LARGEST, LARGEST))
        lowest, highest = minimum(lowest, load(low, LANES)), maximum(highest, load(high, LANES))
    offset, top = min_lane(lowest), max_lane(highest)
    scale = (top / CODES - offset / CODES) * LARGER
    stays = goes_on and get(params, 0) <= offset and get(params, 0) + CODES * get(params, 1) >= top
    if stays:
        offset, scale = get(params, 0), get(params, 1)
    inverse = np.float32(1) / scale if scale > TINY else np.float32(0)
    for channel in range(0, 2 * head_size, LANES):
        bound, code = load(advance(bounds, channel), LANES), advance(values, channel)
        steps = multiply(subtract(bound, splat(offset, LANES)), splat(inverse, LANES))
        outward = clamped(floor(steps) if channel < head_size else ceil(steps), np.float32(0), CODES)
        if stays:  # a bound that did not move keeps its code
            outward = where_equal(bound, load(advance(old, channel), LANES), load(code, LANES), outward)
        store_tile(code, 0, outward)
    put(params, 0, offset)
    put(params, 1, scale)
