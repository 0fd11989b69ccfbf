"""The compiled `select_pages`: the reference's pages, one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.by_device import cpu, reference

INFINITY = torch.inf
LARGEST = torch.finfo(torch.float32).max


def assert_equal_to_reference(scores: torch.Tensor, num_pages: list[int], *budget: int) -> None:
    pages = torch.tensor(num_pages, dtype=torch.int32)
    expected = reference.select_pages(scores, pages, *budget)
    assert torch.equal(cpu.select_pages(scores, pages, *budget), expected)


@pytest.mark.parametrize("pages", [1, 2, 3, 15, 64, 65, 577, 8192])
@pytest.mark.parametrize("budget", [3, 16, 500])
def test_random_scores(pages, budget) -> None:
    scores = torch.randn(2, 3, pages + 5, generator=torch.Generator().manual_seed(pages)) * 40
    assert_equal_to_reference(scores, [pages, max(1, pages - 2)], budget, 1, 2)


@pytest.mark.parametrize("kept", [(0, 1), (1, 2), (0, 0), (5, 3), (8, 8)])
def test_always_kept_pages(kept) -> None:
    scores = torch.randn(1, 2, 300, generator=torch.Generator().manual_seed(1))
    assert_equal_to_reference(scores, [300], 16, *kept)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    values=st.lists(
        st.sampled_from([-INFINITY, -LARGEST, -1.5, -1e-42, -0.0, 0.0, 1e-42, 1.5, 1.5000001, LARGEST]),
        min_size=1,
        max_size=90,
    ),
    budget=st.integers(3, 40),
)
def test_ties_and_extreme_scores(values, budget) -> None:
    assert_equal_to_reference(torch.tensor(values)[None, None], [len(values)], budget, 1, 2)


def test_long_context_of_equal_scores() -> None:
    scores = torch.full((1, 1, 131072), 7.0)
    assert_equal_to_reference(scores, [131072], 4096, 1, 2)
    scores[..., 1000::64] = 8.0
    assert_equal_to_reference(scores, [131072], 4096, 1, 2)


def test_rows_of_a_larger_tensor() -> None:
    scores = torch.randn(2, 6, 200, generator=torch.Generator().manual_seed(2))[:, ::2, 20:]
    assert_equal_to_reference(scores, [180, 37], 20, 1, 2)
