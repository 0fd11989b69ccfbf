"""Compiled kernels, executed instruction by instruction on a CPU, against the reference; see `tools.ptx`.

The interpreter of the other tests runs the source; what the compiler makes of it is executed here.
"""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreter import TOLERANCE
from tests.tools.ptx_child import run

# Scores are float32 sums of products of 16-bit numbers, in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-4}
HALF = {"dtype": torch.bfloat16, "page_size": 16, "head_size": 128, "num_kv_heads": 1}
HALF_SMALL = {"dtype": torch.float16, "page_size": 8, "head_size": 64, "num_kv_heads": 2}
INT4 = {**HALF, "kv_dtype": "int4", "bounds_dtype": "int8", "value_group_size": 32}
INT4_SMALL = {**HALF_SMALL, "kv_dtype": "int4", "bounds_dtype": "int8", "value_group_size": None}


@pytest.fixture
def compiled(compiling):
    """Calls a case in a process whose kernels are not the interpreter's."""
    return lambda *arguments: compiling.submit(run, *arguments).result()


@pytest.mark.parametrize(
    ("formats", "group", "budget"),
    [(INT4_SMALL, 4, None), (INT4, 8, 3), (HALF, 4, None), (HALF_SMALL, 4, 5)],
    ids=["4 bits, pages of 8", "4 bits, three pages", "16 bits", "16 bits, five pages"],
)
def test_attention(compiled, formats, group, budget) -> None:
    actual, expected = compiled("attend", formats, group, budget)
    bound = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("padding", [600, 1], ids=["programs of many tokens", "programs of one token"])
def test_store_of_4_bit_pages(compiled, padding) -> None:
    for actual, expected in compiled("store", INT4, padding):
        assert (actual != expected).float().mean() < 1e-3  # codes at a tie


def test_store_in_16_bits(compiled) -> None:
    for actual, expected in compiled("store", {**HALF_SMALL, "bounds_dtype": "int8"}):
        assert torch.equal(actual, expected)


def test_dequantized_blocks(compiled) -> None:
    actual, expected = compiled("dequantize", INT4)
    bound = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=bound, atol=0, equal_nan=True)
    assert actual[0].isfinite().all()


@pytest.mark.parametrize(
    ("formats", "group_reduce"),
    [(HALF, "max"), ({**HALF_SMALL, "bounds_dtype": "int8"}, "softmax_mean")],
    ids=["bounds in 16 bits", "bounds in 8 bits"],
)
def test_scores(compiled, formats, group_reduce) -> None:
    torch.testing.assert_close(*compiled("score", formats, 4, group_reduce), **CLOSE)


def test_selection(compiled) -> None:
    scores = torch.randn(3, 2, 300, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    actual, expected = compiled("select", scores, [300, 1, 17], 9)
    assert torch.equal(actual, expected)
