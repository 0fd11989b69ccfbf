"""Device helper that writes kmin and kmax of a page, as `kernels.reference_bounds` does."""

import triton
import triton.language as tl

__all__ = ["write_bounds"]

CODES = tl.constexpr(255.0)
FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
TINY = tl.constexpr(2.0**-120)
LARGER = tl.constexpr(1 + 2.0**-20)


@triton.jit
def _inverse(step):
    """1 / step; 0 where that would not be finite."""
    return tl.where(step > TINY, tl.math.div_rn(1.0, tl.where(step > TINY, step, 1.0)), 0.0)


@triton.jit
def write_bounds(values, params, kmin, kmax, channel, HEAD_SIZE: tl.constexpr):
    """Stores the bounds of one page.

    `values` points at the page's kmin, `params` at its offset and scale; None where the bounds are no codes.
    """
    inside = channel < HEAD_SIZE
    if params is not None:
        kmin = tl.minimum(tl.maximum(kmin, -FLOAT32_MAX), FLOAT32_MAX)
        kmax = tl.minimum(tl.maximum(kmax, -FLOAT32_MAX), FLOAT32_MAX)
        offset = tl.min(tl.where(inside, kmin, float("inf")), 0)
        top = tl.max(tl.where(inside, kmax, float("-inf")), 0)
        scale = (tl.math.div_rn(top, CODES) - tl.math.div_rn(offset, CODES)) * LARGER
        steps = _inverse(scale)
        low = tl.minimum(tl.maximum(tl.floor((kmin - offset) * steps), 0.0), CODES).to(tl.uint8)
        high = tl.minimum(tl.maximum(tl.ceil((kmax - offset) * steps), 0.0), CODES).to(tl.uint8)
        tl.store(values + channel, low, mask=inside)
        tl.store(values + HEAD_SIZE + channel, high, mask=inside)
        tl.store(params, offset)
        tl.store(params + 1, scale)
    else:
        tl.store(values + channel, kmin.to(values.dtype.element_ty), mask=inside)
        tl.store(values + HEAD_SIZE + channel, kmax.to(values.dtype.element_ty), mask=inside)
