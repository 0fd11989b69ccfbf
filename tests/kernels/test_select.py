"""Selection: page for page the reference's, which is the oracle's. Ties, infinities, every budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import oracle
from tests.kernels.conformance import EVERY_DEVICE, EXACT, REFERENCE_TOO, new_cache

KINDS = ["normal", "ties", "-inf", "huge", "denormal", "constant"]
LARGEST = torch.finfo(torch.float32).max
EXTREMES = [-torch.inf, -LARGEST, -1.5, -1e-42, -0.0, 0.0, 1e-42, 1.5, 1.5000001, LARGEST]


def scores_of(kind: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if kind == "ties":
        return scores.sign() * scores.abs().round()  # 0.0 and -0.0 among them
    if kind == "-inf":
        return scores.where(scores > 1, -torch.inf)
    if kind == "huge":
        return scores * 1e37
    if kind == "denormal":
        return scores * 1e-41
    return scores if kind == "normal" else torch.full(shape, -3.5)


def select(device: str, scores: torch.Tensor, num_pages: list[int], *budget: int) -> torch.Tensor:
    """What lies behind a row's pages must not matter."""
    pages = torch.tensor(num_pages, dtype=torch.int32)
    behind = torch.arange(scores.shape[-1]) >= pages[:, None, None]
    return new_cache(device, EXACT).kernels.select_pages(
        scores.masked_fill(behind, torch.nan), pages, *budget
    )


def assert_selects(device: str, scores: torch.Tensor, num_pages: list[int], *budget: int) -> None:
    pages = torch.tensor(num_pages, dtype=torch.int32)
    expected = new_cache("reference", EXACT).kernels.select_pages(scores, pages, *budget)
    assert torch.equal(select(device, scores, num_pages, *budget), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [3, 4, 16, 62, 63, 64, 200])
def test_the_references_pages_are_the_oracles(kind, budget) -> None:
    scores, num_pages = scores_of(kind, (4, 2, 63)), [63, 1, 17, 0]
    selected = new_cache("reference", EXACT).kernels.select_pages(
        scores, torch.tensor(num_pages), budget, 1, 2
    )
    for row, pages in enumerate(num_pages):
        for head in range(2):
            expected = oracle.selected_pages(scores[row, head, :pages].tolist(), budget, 1, 2)
            missing = [-1] * (budget - len(expected))
            assert selected[row, head].tolist() == expected + missing


@EVERY_DEVICE
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [3, 4, 16, 62, 63, 64, 200])
def test_selection_is_the_references(device, kind, budget) -> None:
    assert_selects(device, scores_of(kind, (4, 2, 63)), [63, 1, 17, 0], budget, 1, 2)


@EVERY_DEVICE
@pytest.mark.parametrize("pages", [1, 2, 3, 15, 64, 65, 577, 8192])
@pytest.mark.parametrize("budget", [3, 16, 500])
def test_lengths(device, pages, budget) -> None:
    assert_selects(
        device, scores_of("normal", (2, 3, pages + 5)) * 40, [pages, max(1, pages - 2)], budget, 1, 2
    )


@EVERY_DEVICE
@pytest.mark.parametrize("kept", [(0, 1), (1, 2), (0, 0), (5, 3), (8, 8)])
def test_pages_that_are_always_kept(device, kept) -> None:
    assert_selects(device, scores_of("normal", (1, 2, 300)), [300], 16, *kept)


@EVERY_DEVICE
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 10**6),
    num_pages=st.lists(st.integers(0, 150), min_size=1, max_size=3),
    sink=st.integers(0, 3),
    recent=st.integers(0, 3),
    more=st.integers(0, 150),
)
def test_any_selection(device, kind, seed, num_pages, sink, recent, more) -> None:
    scores = scores_of(kind, (len(num_pages), 1, max(*num_pages, 1)), seed)
    assert_selects(device, scores, num_pages, max(1, sink + recent + more), sink, recent)


@EVERY_DEVICE
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(values=st.lists(st.sampled_from(EXTREMES), min_size=1, max_size=90), budget=st.integers(3, 40))
def test_ties_and_extreme_scores(device, values, budget) -> None:
    assert_selects(device, torch.tensor(values)[None, None], [len(values)], budget, 1, 2)


@EVERY_DEVICE
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [3, 128, 700, 5000])
def test_thousands_of_pages(device, kind, budget) -> None:
    """9000 pages are five chunks in Triton; 2048 and 2049 lie around the length from which there are two.

    The candidates fit into a chunk, into two, or into neither.
    """
    assert_selects(device, scores_of(kind, (4, 1, 9000)), [9000, 2049, 2048, 4095], budget, 1, 2)


@REFERENCE_TOO
def test_ties_go_to_the_earlier_page(device) -> None:
    pages = select(device, torch.zeros(1, 1, 12), [12], 6, 1, 2)
    assert pages.flatten().tolist() == [0, 1, 2, 3, 10, 11]


@REFERENCE_TOO
def test_pages_that_are_always_kept_win_against_infinity(device) -> None:
    scores = torch.full((1, 1, 12), torch.inf)
    scores[..., [0, 5, 11]] = -torch.inf
    assert select(device, scores, [12], 4, 1, 2).flatten().tolist() == [0, 1, 10, 11]
    scores = torch.full((1, 1, 9000), torch.inf)
    for pages in (63, 9000):
        selected = select(device, scores, [pages], 5, 1, 2)
        assert selected.tolist() == [[[0, 1, 2, pages - 2, pages - 1]]]


@EVERY_DEVICE
def test_rows_of_a_larger_tensor(device) -> None:
    scores = scores_of("normal", (2, 6, 200))[:, ::2, 20:]
    pages = torch.tensor([180, 37], dtype=torch.int32)
    expected = new_cache("reference", EXACT).kernels.select_pages(scores, pages, 20, 1, 2)
    assert torch.equal(new_cache(device, EXACT).kernels.select_pages(scores, pages, 20, 1, 2), expected)
