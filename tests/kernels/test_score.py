"""Scores: those of the reference, which are bounds of every key's logit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernels.conformance import (
    EVERY_DEVICE,
    EVERY_LINE,
    EVERY_SMALL,
    QUIET,
    REDUCED,
    REFERENCE_TOO,
    Case,
    case_of,
    new_cache,
)

pytestmark = QUIET


def assert_scores(case: Case, reduce: str = "max") -> None:
    """As the reference's, where a row has pages; what lies beyond, selection does not look at."""
    arguments = (case.query, case.table, case.num_pages, 0.3, reduce)
    expected = case.cache.reference.score_pages(*arguments)
    actual = case.cache.kernels.score_pages(*arguments)
    actual = actual.where(expected.isfinite(), expected)
    # Float32 sums of products, in another order.
    atol = 3e-5 if case.cache.kernels.device == "cpu" else 1e-4
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=atol)


@EVERY_DEVICE
@EVERY_LINE
def test_scores_are_the_references(device, line) -> None:
    assert_scores(case_of(line, device))


@EVERY_DEVICE
@pytest.mark.parametrize("line", REDUCED, ids=str)
@pytest.mark.parametrize("reduce", ["mean", "softmax_mean"])
def test_other_reductions_are_the_references(device, line, reduce) -> None:
    assert_scores(case_of(line, device), reduce)


@EVERY_DEVICE
@EVERY_LINE
def test_rows_are_scored_independently(device, line) -> None:
    """However the pages of one row are cut among threads or programs."""
    case = case_of(line, device, [77, 130])
    both = case.cache.kernels.score_pages(case.query, case.table, case.num_pages, 0.3)
    for row, pages in enumerate(case.num_pages.tolist()):
        one = slice(row, row + 1)
        alone = case.cache.kernels.score_pages(case.query[one], case.table[one], case.num_pages[one], 0.3)
        torch.testing.assert_close(alone[..., :pages], both[one, :, :pages], rtol=0, atol=0)


@REFERENCE_TOO
@EVERY_SMALL
def test_a_score_is_an_upper_bound(device, entries) -> None:
    cache = new_cache(device, entries)
    request = cache.new_request()
    cache.append({request: 203}, store=cache.reference.store)
    table, _, num_pages = cache.rows([request])
    query = cache.random(1)
    scores = cache.kernels.score_pages(query, table, num_pages, 1.0)
    keys = np.stack(cache.requests[request].keys)
    size = cache.layout.block.page_size
    for head in range(2):
        dots = keys[:, head] @ query[0, head].float().numpy()
        for page in range(int(num_pages)):
            assert scores[0, head, page] >= dots[page * size : (page + 1) * size].max() - 1e-4
