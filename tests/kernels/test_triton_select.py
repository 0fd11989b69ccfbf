"""The Triton page selection against the reference, page for page: ties, infinities, chunks, every budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.by_device import reference, triton
from tests.kernels.interpreter import DEVICE, on_device
from vllm_quest.kernels.triton.workspace import Workspace, select_scratch


def scores_of(kind: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(shape, generator=generator)
    if kind == "ties":
        return scores.sign() * scores.abs().round()  # 0.0 and -0.0 among them
    if kind == "-inf":
        return scores.where(scores > 1, -torch.inf)
    if kind == "huge":
        return scores * 1e37
    if kind == "denormal":
        return scores * 1e-41
    return scores if kind == "normal" else torch.full(shape, -3.5)


KINDS = ["normal", "ties", "-inf", "huge", "denormal", "constant"]


def assert_selects(scores, num_pages, budget, sink=1, recent=2) -> None:
    """As the reference does; what lies behind a row's pages must not matter."""
    num_pages = torch.tensor(num_pages, dtype=torch.int32)
    expected = reference.select_pages(scores, num_pages, budget, sink, recent)
    behind = torch.arange(scores.shape[-1]) >= num_pages[:, None, None]
    poisoned = scores.masked_fill(behind, torch.nan)
    actual = triton.select_pages(*on_device(poisoned, num_pages, budget, sink, recent))
    assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [3, 4, 16, 62, 63, 64, 200])
def test_selection_is_the_references(kind, budget) -> None:
    assert_selects(scores_of(kind, (4, 2, 63)), [63, 1, 17, 0], budget)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 10**6),
    num_pages=st.lists(st.integers(0, 150), min_size=1, max_size=3),
    sink=st.integers(0, 3),
    recent=st.integers(0, 3),
    more=st.integers(0, 150),
)
def test_any_selection(kind, seed, num_pages, sink, recent, more) -> None:
    shape = (len(num_pages), 1, max(*num_pages, 1))
    assert_selects(scores_of(kind, shape, seed), num_pages, max(1, sink + recent + more), sink, recent)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [3, 128, 700, 5000])
def test_chunks_agree_on_one_selection(kind, budget) -> None:
    """9000 pages are five chunks; 2048 and 2049 lie around the length from which there are two.

    The candidates fit into a chunk, into two, or into neither.
    """
    assert_selects(scores_of(kind, (4, 1, 9000)), [9000, 2049, 2048, 4095], budget)


@pytest.mark.parametrize(("kind", "budget"), [("normal", 256), ("ties", 1024)])
def test_a_million_tokens(kind, budget) -> None:
    """131,072 pages; with 1024 pages of each of the 64 chunks the candidates outnumber a chunk."""
    assert_selects(scores_of(kind, (1, 1, 131072)), [131071], budget)


def test_first_and_last_pages_win_against_infinity() -> None:
    scores = torch.full((1, 1, 9000), torch.inf)
    for pages in (63, 9000):
        num_pages = torch.tensor([pages], dtype=torch.int32)
        selected = triton.select_pages(*on_device(scores, num_pages, 5, 1, 2)).cpu()
        assert selected.tolist() == [[[0, 1, 2, pages - 2, pages - 1]]]


def test_nan_scores_select_pages_of_the_context() -> None:
    scores = torch.full((1, 1, 100), torch.nan)
    scores[..., 40:50] = -scores[..., 40:50]
    selected = triton.select_pages(*on_device(scores, torch.tensor([90], dtype=torch.int32), 20, 1, 2))
    selected = selected.flatten().tolist()
    assert selected == sorted(set(selected))
    assert {0, 88, 89} <= set(selected) <= set(range(90))


def test_persistent_buffers_serve_one_step_after_another() -> None:
    workspace = Workspace.allocate(select_scratch(2, 9000, 100), 2, DEVICE)
    out = torch.full((2, 1, 100), 7, dtype=torch.int32, device=DEVICE)
    for seed, pages in enumerate([[9000, 5], [2100, 9000], [0, 120]]):
        scores, num_pages = scores_of("normal", (2, 1, 9000), seed), torch.tensor(pages, dtype=torch.int32)
        arguments = (scores, num_pages, 100, 1, 2)
        assert triton.select_pages(*on_device(*arguments), out=out, workspace=workspace) is out
        assert torch.equal(out.cpu(), reference.select_pages(*arguments))
        assert not workspace.arrivals.any()


def test_what_the_kernel_relies_on_is_checked() -> None:
    scores, num_pages = torch.zeros(1, 1, 8), torch.tensor([8], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"budget_pages: 2; allowed: at least 1 \+ 2"):
        triton.select_pages(scores, num_pages, 2, 1, 2)
    with pytest.raises(ValueError, match=r"page_scores: torch.float16"):
        triton.select_pages(scores.half(), num_pages, 4, 1, 2)
    with pytest.raises(ValueError, match=r"out: \(1, 1, 5\) torch.int32; needed: \(1, 1, 4\) int32"):
        triton.select_pages(scores, num_pages, 4, 1, 2, out=torch.zeros(1, 1, 5, dtype=torch.int32))
