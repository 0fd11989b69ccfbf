"""Device helpers for 4-bit codes and what belongs to them.

A byte holds token i of a page in its low nibble and token i + S / 2 in its high one. So a tile of byte rows
is two tiles of tokens, and nothing has to change places between threads.
"""

import triton
import triton.language as tl

from vllm_quest.formats.int4 import reference
from vllm_quest.kernels.triton.bounds import inverse

__all__ = [
    "FINE",
    "LARGEST_FLOAT16",
    "NO_FRACTION",
    "STEP",
    "TAGS",
    "as_float",
    "fine_codes",
    "fraction",
    "group_channels",
    "limited",
    "load_residual",
    "power_of_two",
    "read_values",
    "split_words",
    "step_of",
    "units_of",
]

STEPS = tl.constexpr(float(reference.STEPS))
FINE = tl.constexpr(float(reference.FINE))
NO_FRACTION = tl.constexpr(reference.NO_FRACTION)
TAGS = tl.constexpr(reference.TAGS)
STEP = tl.constexpr(1 / reference.STEPS)  # of a range, a quantizer's step
LARGEST_FLOAT16 = tl.constexpr(65504.0)
TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2^23: a sum with it has no room for a fraction


@triton.jit
def units_of(pointer):
    """Elements of 16 bytes, in which blocks and heads of a cache are strided."""
    return 128 // pointer.dtype.element_ty.primitive_bitwidth


@triton.jit
def step_of(low, high):
    """A quantizer's step, rounded as the reference rounds it."""
    return tl.math.div_rn(high, STEPS) - tl.math.div_rn(low, STEPS)


@triton.jit
def fine_codes(x, zero, step):
    """8-bit codes, int32: the 4-bit code, and in the low nibble sixteenths of a step from -8 on."""
    fine = tl.minimum(tl.maximum((x - zero) * (inverse(step) * FINE), 0.0), STEPS * FINE)
    return ((fine + TO_INTEGER) - TO_INTEGER).to(tl.int32) + NO_FRACTION  # ties to even


@triton.jit
def as_float(code):
    """A small int32 in float32, exactly: the bits of 2^23 + code, less 2^23. Conversions are slow."""
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def power_of_two(x):
    """The largest one up to x, 1 for 0: what float16 is divided by loses no bit."""
    return tl.where(x > 0.0, (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True), 1.0)


@triton.jit
def fraction(residual):
    """What a residual nibble, int32, adds to a 4-bit code."""
    return (as_float(residual) - NO_FRACTION) / FINE


@triton.jit
def load_residual(pointers, mask):
    """Residual bytes, int32; outside `mask` that of two tokens without a fraction.

    Not by the load's `other`: Triton 3.6 extends the sign of a byte over the word that it fills.
    """
    return tl.where(mask, tl.load(pointers, mask=mask, other=0).to(tl.int32), NO_FRACTION * 17)


@triton.jit
def group_channels(
    GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, GROUPS_PAD: tl.constexpr, PAD: tl.constexpr
):
    """The channels of V, each group padded: ``[GROUPS_PAD * PAD]``, and which of these places have one."""
    place = tl.arange(0, GROUPS_PAD * PAD)
    if GROUPS == 1:  # from which the compiler sees that channels follow each other
        return place, place < GROUP_SIZE
    return place // PAD * GROUP_SIZE + place % PAD, (place % PAD < GROUP_SIZE) & (place // PAD < GROUPS)


@triton.jit
def split_words(words):
    """Zero point and scale in float32: a word holds both as bfloat16."""
    return (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)


@triton.jit
def read_values(codes, params, mask, GROUPS_PAD: tl.constexpr):
    """V from its codes in float32, ``[n, GROUPS_PAD * c]``, and words at `params`, ``[n, GROUPS_PAD]``."""
    SHAPE: tl.constexpr = [codes.shape[0], GROUPS_PAD, codes.shape[1] // GROUPS_PAD]
    zero, scale = split_words(tl.load(params, mask=mask, other=0))
    return (zero[:, :, None] + scale[:, :, None] * codes.reshape(SHAPE)).reshape(codes.shape)


@triton.jit
def limited(x, IS_FLOAT16: tl.constexpr):
    """`x` within the model's dtype: rounded bounds and zero points may lie beyond float16."""
    if IS_FLOAT16:
        x = tl.minimum(tl.maximum(x, -LARGEST_FLOAT16), LARGEST_FLOAT16)
    return x
