"""What is Triton's own of scoring: splits, the buffers of CUDA graphs, the tensor cores' range, checks."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.conformance import QUIET, Case, case_of, dense_line
from tests.kernels.interpreter import DEVICE, DTYPES, on_device
from vllm_quest.kernels.bounds import PageBounds
from vllm_quest.kernels.triton.workspace import Workspace
from vllm_quest.scorers.minmax.triton import score_pages, score_scratch

pytestmark = QUIET
# Scores are float32 sums of products of 16-bit numbers, in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-4}


def assert_scores(case: Case, scale: float, reduce: str, **close) -> None:
    arguments = (case.query, case.table, case.num_pages, scale, reduce)
    expected = case.cache.reference.score_pages(*arguments)
    actual = case.cache.kernels.score_pages(*arguments)
    torch.testing.assert_close(actual.where(expected.isfinite(), expected), expected, **(close or CLOSE))


@pytest.mark.parametrize("group_reduce", ["max", "softmax_mean"])
def test_one_long_row_is_split(group_reduce) -> None:
    """313 pages are five tiles: the long row has several splits of several tiles, the short ones one tile."""
    line = dense_line(DTYPES[0], block_size=64, head_size=16, group=3)
    case = case_of(line, "triton", [2500, 9, 700, 17])
    assert_scores(case._replace(query=case.query * 4), 0.25, group_reduce)


@pytest.mark.parametrize("group_reduce", ["max", "mean", "softmax_mean"])
def test_persistent_buffers_serve_one_step_after_another(group_reduce) -> None:
    """A CUDA graph's buffers: too many rows, stale content, padding rows of length 0 with garbage tables."""
    case = case_of(dense_line(DTYPES[0]), "triton", [63, 17, 30])
    case.num_pages[1], case.table[1] = 0, 2**30
    pairs, max_pages = 3 * 2, case.table.shape[1] * 4
    workspace = Workspace.allocate(
        score_scratch(pairs, 4, max_pages, 64, group_reduce, DEVICE), pairs, DEVICE
    )
    workspace.scratch.fill_(torch.nan)
    out = torch.full((3, 2, max_pages), 7.0, device=DEVICE)
    rest = (case.table, case.num_pages, 0.3, group_reduce)
    expected = case.cache.reference.score_pages(case.query, *rest).nan_to_num(7.0, neginf=7.0)
    arguments = on_device(case.query, case.cache.pages.summary, *rest)
    for _ in range(2):
        assert score_pages(*arguments, out=out, workspace=workspace) is out
        torch.testing.assert_close(out.cpu(), expected, **CLOSE)
        assert not workspace.arrivals.any()


def test_huge_keys_do_not_overflow() -> None:
    case = case_of(dense_line(torch.float16), "triton", [63])
    case.cache.pages.summary.values.mul_(10000)
    assert_scores(case, 0.3, "max", rtol=1e-5, atol=1)


def test_what_the_kernel_relies_on_is_checked() -> None:
    case = case_of(dense_line(DTYPES[0]), "triton", [63])
    query, bounds, rows = case.query, case.cache.pages.summary, (case.table, case.num_pages, 1.0)
    moved = PageBounds(bounds.values.movedim(3, 2), None)
    for arguments, message in [
        ((query, bounds, *rows, "sum"), "group_reduce: 'sum'; allowed: max, mean"),
        ((query[:, :7], bounds, *rows, "max"), "7 heads for 2 KV heads"),
        ((case.cache.random(1, 17), bounds, *rows, "max"), "groups of 1 to 16"),
        ((query, moved, *rows, "max"), r"bounds: .* is not \[B, H, P, 2, D\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            score_pages(*arguments)
    workspace = Workspace.allocate(1, 1, DEVICE)
    with pytest.raises(ValueError, match="workspace: 1 elements and 1 counters"):
        score_pages(query, bounds, *rows, "softmax_mean", workspace=workspace)
