"""The share that two levels must read, against a count by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels.second_level import group_scores, share_read


def test_scores_are_the_bound_of_equation_2() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 3, 4, 8, generator=generator)
    kmin, kmax = torch.randn(2, 3, 5, 8, generator=generator).sort(0).values
    scores = group_scores(queries, kmin, kmax)
    assert scores.shape == (2, 3, 5)
    for q, h, p in ((0, 0, 0), (1, 2, 4), (0, 1, 3)):
        products = torch.stack([queries[q, h] * kmin[h, p], queries[q, h] * kmax[h, p]])
        assert scores[q, h, p].item() == pytest.approx(products.amax(0).sum(-1).max().item(), rel=1e-5)


@pytest.mark.parametrize(("pages", "share"), [(1, 0.5 + 1 / 4), (2, 0.5 + 2 / 4)])
def test_only_groups_that_may_hold_a_selected_page_are_read(pages, share) -> None:
    """One channel, pages of two tokens, four groups of two pages; the best pages stand in two groups."""
    keys = torch.tensor([1.0, 1, 9, 8, 0, 0, 1, 1, 7, 7, 2, 2, 3, 3, 0, 1]).view(1, 16, 1)
    assert share_read(keys, torch.ones(1, 1, 1, 1), page_size=2, pages=pages, group=2) == pytest.approx(share)


def test_pages_that_cannot_be_told_apart_cost_everything() -> None:
    """Every group reaches the threshold: two levels read all that one reads, and the groups' bounds."""
    keys = torch.ones(2, 64, 4)
    assert share_read(keys, torch.ones(3, 2, 1, 4), page_size=4, pages=4, group=4) == 1.25
