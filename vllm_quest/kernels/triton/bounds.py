"""Device helpers that write kmin and kmax of a page, as `kernels.bounds` does."""

import triton
import triton.language as tl

from vllm_quest.kernels import bounds as reference

__all__ = ["inverse", "round_down", "widen_bounds", "write_bounds"]

CODES = tl.constexpr(float(reference.CODES))
FLOAT32_MAX = tl.constexpr(reference.FLOAT32_MAX)
TINY = tl.constexpr(reference.TINY)
LARGER = tl.constexpr(reference.LARGER)


@triton.jit
def inverse(step):
    """1 / step; 0 where that would not be finite."""
    return tl.where(step > TINY, tl.math.div_rn(1.0, tl.where(step > TINY, step, 1.0)), 0.0)


@triton.jit
def round_down(x):
    """The largest bfloat16 that is not above each float32 of `x`, still as a float32; NaN is not handled."""
    bits = x.to(tl.int32, bitcast=True)
    cut = bits & -65536  # toward zero
    # A sign bit: below zero, the next number down has the larger magnitude.
    return tl.where((bits < 0) & (bits != cut), cut + 65536, cut).to(tl.float32, bitcast=True)


@triton.jit
def _limits(kmin, kmax, inside):
    """Finite kmin and kmax, the offset of their codes, and the span's top."""
    kmin = tl.minimum(tl.maximum(kmin, -FLOAT32_MAX), FLOAT32_MAX)
    kmax = tl.minimum(tl.maximum(kmax, -FLOAT32_MAX), FLOAT32_MAX)
    offset = tl.min(tl.where(inside, kmin, float("inf")), 0)
    top = tl.max(tl.where(inside, kmax, float("-inf")), 0)
    return kmin, kmax, offset, top


@triton.jit
def _scale_of(offset, top):
    return (tl.math.div_rn(top, CODES) - tl.math.div_rn(offset, CODES)) * LARGER


@triton.jit
def _codes_of(kmin, kmax, offset, scale):
    """Codes of kmin, rounded down, and of kmax, rounded up."""
    steps = inverse(scale)
    low = tl.minimum(tl.maximum(tl.floor((kmin - offset) * steps), 0.0), CODES)
    high = tl.minimum(tl.maximum(tl.ceil((kmax - offset) * steps), 0.0), CODES)
    return low.to(tl.uint8), high.to(tl.uint8)


@triton.jit
def write_bounds(values, params, kmin, kmax, channel, HEAD_SIZE: tl.constexpr):
    """Stores the bounds of one page.

    `values` points at the page's kmin, `params` at its offset and scale; None where the bounds are no codes.
    """
    inside = channel < HEAD_SIZE
    if params is not None:
        kmin, kmax, offset, top = _limits(kmin, kmax, inside)
        scale = _scale_of(offset, top)
        low, high = _codes_of(kmin, kmax, offset, scale)
        tl.store(values + channel, low, mask=inside)
        tl.store(values + HEAD_SIZE + channel, high, mask=inside)
        tl.store(params, offset)
        tl.store(params + 1, scale)
    else:
        tl.store(values + channel, kmin.to(values.dtype.element_ty), mask=inside)
        tl.store(values + HEAD_SIZE + channel, kmax.to(values.dtype.element_ty), mask=inside)


@triton.jit
def widen_bounds(values, params, kmin, kmax, goes_on, channel, HEAD_SIZE: tl.constexpr):
    """Stores the bounds of one 4-bit page, bfloat16 or codes; where it goes on, the stored ones are widened.

    A barrier before the first write lets the caller read, before, what it will write behind.

    Returns:
        The stored kmin and kmax before, which mean something only where the page goes on; and after.
    """
    inside = channel < HEAD_SIZE
    known = channel < tl.where(goes_on, HEAD_SIZE, 0)
    if params is not None:
        old_low = tl.load(values + channel, mask=known, other=0)
        old_high = tl.load(values + HEAD_SIZE + channel, mask=known, other=0)
        old_offset = tl.load(params, mask=goes_on, other=0.0)
        old_scale = tl.load(params + 1, mask=goes_on, other=0.0)
        old_min = old_offset + old_scale * old_low.to(tl.float32)
        old_max = old_offset + old_scale * old_high.to(tl.float32)
        kmin = tl.where(goes_on, tl.minimum(kmin, old_min), kmin)
        kmax = tl.where(goes_on, tl.maximum(kmax, old_max), kmax)
        kmin, kmax, offset, top = _limits(kmin, kmax, inside)
        # Where the old offset and scale reach, they stay, and so do the codes of bounds that did not move.
        stays = goes_on & (old_offset <= offset) & (old_offset + CODES * old_scale >= top)
        scale = tl.where(stays, old_scale, _scale_of(offset, top))
        offset = tl.where(stays, old_offset, offset)
        low, high = _codes_of(kmin, kmax, offset, scale)
        low = tl.where(stays & (kmin == old_min), old_low, low)
        high = tl.where(stays & (kmax == old_max), old_high, high)
        tl.debug_barrier()
        tl.store(values + channel, low, mask=inside)
        tl.store(values + HEAD_SIZE + channel, high, mask=inside)
        tl.store(params, offset)
        tl.store(params + 1, scale)
        new_min = offset + scale * low.to(tl.float32)
        new_max = offset + scale * high.to(tl.float32)
    else:
        old_min = tl.load(values + channel, mask=known, other=0.0).to(tl.float32)
        old_max = tl.load(values + HEAD_SIZE + channel, mask=known, other=0.0).to(tl.float32)
        new_min = round_down(tl.where(goes_on, tl.minimum(kmin, old_min), kmin))
        new_max = -round_down(-tl.where(goes_on, tl.maximum(kmax, old_max), kmax))
        tl.debug_barrier()
        tl.store(values + channel, new_min.to(values.dtype.element_ty), mask=inside)
        tl.store(values + HEAD_SIZE + channel, new_max.to(values.dtype.element_ty), mask=inside)
    return old_min, old_max, new_min, new_max
