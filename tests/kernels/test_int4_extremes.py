"""4-bit pages have a clear outcome for any input."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.conformance import new_cache
from tests.kernels.int4_cache import (
    DIM,
    EVERY_DEVICE,
    EVERY_FORMAT,
    GROUP,
    HEADS,
    attended,
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
@EVERY_DEVICE
@pytest.mark.parametrize("everywhere", [True, False], ids=["everywhere", "one outlier"])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_inputs(device, entries, extreme, everywhere) -> None:
    """Whatever is stored reads back finite; what is beyond 2^126, as that.

    One outlier costs its own page and head their precision, and no other.
    """
    size = entries["page_size"]
    key = torch.randn(19, HEADS, DIM, generator=torch.Generator().manual_seed(4))
    if everywhere:
        key[:] = EXTREMES[extreme]
    else:
        key[11, 1, 3] = EXTREMES[extreme]
    cache = new_cache(device, entries)
    write(cache, key, [9, 1, 1, 8])
    expected = key.clamp(-LARGEST, LARGEST)
    page = 11 // size
    apart = torch.ones(19, HEADS, dtype=torch.bool)
    apart[page * size : (page + 1) * size, 1] = False
    for part in stored(cache, 19):
        assert part.isfinite().all()
        if everywhere:
            torch.testing.assert_close(part, expected, rtol=2**-7, atol=1e-37)
        else:
            torch.testing.assert_close(part[11, 1, 3], expected[11, 1, 3], rtol=2**-7, atol=0.3)
            torch.testing.assert_close(part[apart], expected[apart], rtol=0, atol=0.5)
    # A query so small that its products are finite; sums over several of the largest numbers never are.
    query = 1e-38 * torch.randn(1, GROUP * HEADS, DIM, generator=torch.Generator().manual_seed(5))
    assert attended(cache, query, 1 if everywhere else 19, 1.0).isfinite().all()


@EVERY_FORMAT
@EVERY_DEVICE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_what_is_finite_stays_finite(device, entries, dtype) -> None:
    """Up to the largest numbers of both signs: bounds and zero points are rounded beyond those of float16."""
    largest, tokens = torch.finfo(dtype).max, 19
    generator = torch.Generator().manual_seed(9)
    key = ((2 * torch.rand(tokens, HEADS, DIM, generator=generator) - 1) * largest).to(dtype)
    key[:, :, ::5], key[:, :, 1::5] = largest, -largest
    key[11] = -largest
    cache = new_cache(device, entries | {"dtype": dtype})
    write(cache, key, [9, 1, 1, 8])
    blocks, wanted = torch.zeros(1, dtype=torch.int32), torch.tensor([tokens], dtype=torch.int32)
    expected = key.float().clamp(-LARGEST, LARGEST)
    for part in cache.kernels.dequantize_blocks(blocks, wanted):
        read = part[0, :, :tokens].transpose(0, 1).float()
        assert read.isfinite().all()
        assert ((read - expected).abs() <= 0.55 * 2 * expected.abs().max() / 15).all()
    # One token's V is what is read; sums over several of float32's largest numbers never are finite.
    query = torch.zeros(1, GROUP * HEADS, DIM, dtype=dtype)
    for length in (1, tokens) if dtype == torch.float16 else (1,):
        assert attended(cache, query, length, 1.0).isfinite().all()
