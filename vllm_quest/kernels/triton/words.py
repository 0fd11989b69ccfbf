"""Device helpers for words of two bytes, one of an even and one of an odd channel.

A register has two words. By PTX a few instructions make of it what enters a tensor core; the compiler would
take every byte out of its register, and put every two results into one again. Elsewhere (interpreter, AMD),
and for the residuals of a page that is being filled, the same stands in plain Triton.

The four codes of a word are those of the even channel's low token and high token, and of the odd channel's.
"""

import triton
import triton.language as tl

from vllm_quest.kernels.triton.codes import FINE, NO_FRACTION

__all__ = ["HIGH_UNIT", "LOW_UNIT", "bytes_of", "codes_of", "fine_codes_of", "floats_of", "times_range"]

# In float16 a code or a byte is what its bits say as they are, a subnormal number; tensor cores take those.
LOW_UNIT = tl.constexpr(2.0**24)  # what a low code or a byte counts
HIGH_UNIT = tl.constexpr(2.0**20)

_HALVES = tl.constexpr("""{
.reg .b32 odd;
shr.b32 odd, $4, 8;
and.b32 $0, $4, 0x000F000F;
and.b32 $1, $4, 0x00F000F0;
and.b32 $2, odd, 0x000F000F;
and.b32 $3, odd, 0x00F000F0;
}""")
# In bfloat16: the bits of 128 + code (0xEA is a & b | c), times 1, less 128.
_BFLOATS = tl.constexpr("""{
.reg .b32 word, bits, one, less;
mov.b32 bits, 0x43004300;
mov.b32 one, 0x3F803F80;
mov.b32 less, 0xC300C300;
lop3.b32 word, $4, 0x000F000F, bits, 0xEA;
fma.rn.bf16x2 $0, word, one, less;
shr.b32 word, $4, 4;
lop3.b32 word, word, 0x000F000F, bits, 0xEA;
fma.rn.bf16x2 $1, word, one, less;
shr.b32 word, $4, 8;
lop3.b32 word, word, 0x000F000F, bits, 0xEA;
fma.rn.bf16x2 $2, word, one, less;
shr.b32 word, $4, 12;
lop3.b32 word, word, 0x000F000F, bits, 0xEA;
fma.rn.bf16x2 $3, word, one, less;
}""")
# Halves of 1024 + byte: their differences are exact.
_TIMES_RANGE = tl.constexpr("""{
.reg .b32 bits, low, high;
mov.b32 bits, 0x64646464;
prmt.b32 low, $4, bits, 0x4240;
prmt.b32 high, $5, bits, 0x4240;
sub.f16x2 high, high, low;
mul.f16x2 $0, $2, high;
prmt.b32 low, $4, bits, 0x4341;
prmt.b32 high, $5, bits, 0x4341;
sub.f16x2 high, high, low;
mul.f16x2 $1, $3, high;
}""")
_BYTES = tl.constexpr("""{
and.b32 $0, $2, 0x00FF00FF;
prmt.b32 $1, $2, 0, 0x4341;
}""")
# The bits of 2^23 + byte, less 2^23.
_FLOATS = tl.constexpr("""{
.reg .b32 bits, word;
mov.b32 bits, 0x4B000000;
prmt.b32 word, $4, bits, 0x7650;
add.f32 $0, word, 0fCB000000;
prmt.b32 word, $4, bits, 0x7652;
add.f32 $1, word, 0fCB000000;
prmt.b32 word, $4, bits, 0x7651;
add.f32 $2, word, 0fCB000000;
prmt.b32 word, $4, bits, 0x7653;
add.f32 $3, word, 0fCB000000;
}""")


@triton.jit
def codes_of(words, DOT: tl.constexpr, PTX: tl.constexpr):
    """The four codes of uint16 words in DOT; by PTX in float16 parts of LOW_UNIT and HIGH_UNIT."""
    if not PTX:
        return (
            (words & 15).to(DOT),
            (words >> 4 & 15).to(DOT),
            (words >> 8 & 15).to(DOT),
            (words >> 12).to(DOT),
        )
    elif DOT.is_fp16():
        return tl.inline_asm_elementwise(
            _HALVES,
            "=r,=r,=r,=r,r",
            [words],
            (tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        return tl.inline_asm_elementwise(
            _BFLOATS,
            "=r,=r,=r,=r,r",
            [words],
            (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )


@triton.jit
def _fine_code(code, residual, DOT: tl.constexpr):
    """A code, uint16, with its residual as a fraction, exactly: the bits of 1024 + both, less."""
    bits = (code & 15) << 4 | (residual & 15) | 0x6400
    return ((bits.to(tl.float16, bitcast=True) - (1024.0 + NO_FRACTION)) / FINE).to(DOT)


@triton.jit
def fine_codes_of(words, residual, DOT: tl.constexpr):
    """The four codes of uint16 words with the fractions of their residuals; exact in DOT."""
    return (
        _fine_code(words, residual, DOT),
        _fine_code(words >> 4, residual >> 4, DOT),
        _fine_code(words >> 8, residual >> 8, DOT),
        _fine_code(words >> 12, residual >> 12, DOT),
    )


@triton.jit
def bytes_of(words, DOT: tl.constexpr, PTX: tl.constexpr):
    """The even and the odd bytes of uint16 words in DOT, a float16 by PTX: parts of LOW_UNIT."""
    if not PTX:
        return (words & 255).to(DOT), (words >> 8).to(DOT)
    else:
        return tl.inline_asm_elementwise(
            _BYTES, "=r,=r,r", [words], (tl.float16, tl.float16), is_pure=True, pack=2
        )


@triton.jit
def floats_of(words, PTX: tl.constexpr):
    """The even and the odd bytes of uint16 words in float32."""
    if not PTX:
        return (words & 255).to(tl.float32), (words >> 8).to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            _FLOATS, "=r,=r,=r,=r,r", [words], (tl.float32, tl.float32), is_pure=True, pack=2
        )


@triton.jit
def times_range(even, odd, low, high, DOT: tl.constexpr, PTX: tl.constexpr):
    """`even` and `odd` times what the even and the odd bytes of `high` are above those of `low`, in DOT."""
    even, odd = even.to(DOT), odd.to(DOT)
    if not PTX:
        return (
            even * ((high & 255).to(DOT) - (low & 255).to(DOT)),
            odd * ((high >> 8).to(DOT) - (low >> 8).to(DOT)),
        )
    else:
        return tl.inline_asm_elementwise(
            _TIMES_RANGE,
            "=r,=r,r,r,r,r",
            [even, odd, low, high],
            (tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
