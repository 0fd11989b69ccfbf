"""What is Triton's own of 4-bit pages: extreme elements in its arithmetic, thresholds by split, checks."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cache import PagedCache
from tests.kernels.conformance import INT4, LINES, QUIET, Case, case_of
from tests.kernels.interpreter import DTYPES
from tests.kernels.test_attend import assert_attends
from vllm_quest.formats.int4 import Int4Cache
from vllm_quest.formats.int4.triton import attend_pages, dequantize_blocks

pytestmark = QUIET


@pytest.mark.parametrize(
    ("dtype", "everywhere", "element"),
    [
        *[(DTYPES[-1], True, element) for element in (0.0, 1e-37, torch.inf, -torch.inf)],
        *[(DTYPES[0], False, element) for element in (torch.inf, -torch.inf, 3e38)],
        (torch.float16, False, 65504.0),  # whose bound and zero point are beyond float16
    ],
)
def test_extreme_elements(dtype, everywhere, element) -> None:
    """Everywhere, and as an outlier; what is stored is read as the reference reads it, and finite."""
    cache = PagedCache("triton", num_kv_heads=1, block_size=64, head_size=32, dtype=dtype, **INT4)
    key = torch.randn(11, 1, 32, generator=torch.Generator().manual_seed(4)).to(dtype)
    key[slice(None) if everywhere else 9] = element
    request = cache.new_request()
    for part in key.split([6, 5]):
        cache.append({request: len(part)}, key=part, value=part)
    # A query so small that its products are finite; sums over several of the largest numbers never are.
    query = torch.full((1, 2, 32), 2.0**-20 if dtype == torch.float16 else 2.0**-120).to(dtype)
    table, seq_lens, num_pages = cache.rows([request])
    assert_attends(
        Case(cache, table, seq_lens.clamp(max=1) if everywhere else seq_lens, num_pages, query), None
    )


@pytest.mark.parametrize("line", [line for line in LINES if line.entries.get("kv_dtype") == "int4"], ids=str)
def test_a_value_threshold_drops_what_hardly_counts(line) -> None:
    case = case_of(line, "triton", [330, 1, 17, 63])
    assert_attends(case, None, value_threshold=30.0)
    # What a split drops depends on what it has met so far.
    with pytest.raises(AssertionError, match="not close"):
        assert_attends(case, None, value_threshold=0.5)


def test_what_the_kernels_rely_on_is_checked() -> None:
    cache = PagedCache("triton", block_size=64, head_size=64, **INT4).pages.cache
    key, value = cache
    out = torch.zeros(1, 2, 64, 128).chunk(2, -1)
    block = torch.zeros(1, dtype=torch.int32)
    channel_major = key._replace(codes=key.codes.mT.contiguous().mT)
    apart = value._replace(params=value.params.contiguous())
    for pages, blocks, message in [
        (Int4Cache(channel_major, value), block, "key_cache: .* token-major pages"),
        (Int4Cache(key, apart), block, r"value_cache\.params: "),
        (cache, block.long(), "blocks, num_tokens: torch.int64"),
    ]:
        with pytest.raises(ValueError, match=message):
            dequantize_blocks(pages, blocks, block, *out)
    with pytest.raises(ValueError, match="page_size: 16; the cache has pages of 8 tokens"):
        attend_pages(torch.zeros(1, 2, 64), cache, block[None], block, None, 16, 1.0)
