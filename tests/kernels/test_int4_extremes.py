"""4-bit pages have a clear outcome for any input."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cache import PagedCache
from tests.kernels.int4_cache import (
    BLOCK,
    DIM,
    EVERY_FORMAT,
    EVERY_IMPLEMENTATION,
    HEADS,
    new_cache,
    stored,
    write,
)
from vllm_quest.formats.int4.reference import LARGEST

EXTREMES = {
    "zeros": torch.zeros(()),
    "negative zeros": -torch.zeros(()),
    "a constant": torch.full((), 0.3),
    "tiny": torch.full((), 1e-38),
    "the smallest": torch.full((), 1e-45),
    "the largest": torch.full((), torch.finfo(torch.float32).max),
    "infinity": torch.full((), torch.inf),
    "negative infinity": torch.full((), -torch.inf),
}


@EVERY_FORMAT
@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("everywhere", [True, False], ids=["everywhere", "one outlier"])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_inputs(format, ops, extreme, everywhere) -> None:
    """Whatever is stored reads back finite; what is beyond 2^126, as that.

    One outlier costs its own page and head their precision, and no other.
    """
    key = torch.randn(19, HEADS, DIM, generator=torch.Generator().manual_seed(4))
    if everywhere:
        key[:] = EXTREMES[extreme]
    else:
        key[11, 1, 3] = EXTREMES[extreme]
    cache = new_cache(format)
    write(ops, cache.pages, key, [9, 1, 1, 8])
    expected = key.clamp(-LARGEST, LARGEST)
    page = 11 // format[0]
    apart = torch.ones(19, HEADS, dtype=torch.bool)
    apart[page * format[0] : (page + 1) * format[0], 1] = False
    for part in stored(cache.pages, 19):
        assert part.isfinite().all()
        if everywhere:
            torch.testing.assert_close(part, expected, rtol=2**-7, atol=1e-37)
        else:
            torch.testing.assert_close(part[11, 1, 3], expected[11, 1, 3], rtol=2**-7, atol=0.3)
            torch.testing.assert_close(part[apart], expected[apart], rtol=0, atol=0.5)
    # A query so small that its products are finite; sums over several of the largest numbers never are.
    query = 1e-38 * torch.randn(1, 2 * HEADS, DIM, generator=torch.Generator().manual_seed(5))
    table, length = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([1 if everywhere else 19]).int()
    views = cache.pages
    out = ops.attend_pages(query, views.cache, table, length, None, format[0], 1.0)
    assert out.isfinite().all()


@EVERY_FORMAT
@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_what_is_finite_stays_finite(format, ops, dtype) -> None:
    """Up to the largest numbers of both signs: bounds and zero points are rounded beyond those of float16."""
    largest, tokens = torch.finfo(dtype).max, 19
    generator = torch.Generator().manual_seed(9)
    key = ((2 * torch.rand(tokens, HEADS, DIM, generator=generator) - 1) * largest).to(dtype)
    key[:, :, ::5], key[:, :, 1::5] = largest, -largest
    key[11] = -largest
    cache = new_cache(format, dtype=dtype)
    views = cache.pages
    write(ops, views, key, [9, 1, 1, 8])
    out = PagedCache(
        num_blocks=1, num_kv_heads=HEADS, block_size=BLOCK, page_size=8, head_size=DIM, dtype=dtype
    ).pages
    blocks, wanted = torch.zeros(1, dtype=torch.int32), torch.tensor([tokens], dtype=torch.int32)
    ops.dequantize_blocks(views.cache, blocks, wanted, out.cache)
    expected = key.float().clamp(-LARGEST, LARGEST)
    for part in out.cache:
        read = part[0, :, :tokens].transpose(0, 1).float()
        assert read.isfinite().all()
        assert ((read - expected).abs() <= 0.55 * 2 * expected.abs().max() / 15).all()
    # One token's V is what is read; sums over several of float32's largest numbers never are finite.
    query = torch.zeros(1, HEADS, DIM, dtype=dtype)
    for length in (1, tokens) if dtype == torch.float16 else (1,):
        table, seq_lens = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([length], dtype=torch.int32)
        read = ops.attend_pages(query, views.cache, table, seq_lens, None, format[0], 1.0)
        assert read.isfinite().all()
