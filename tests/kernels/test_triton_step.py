"""Whole decode steps in Triton, with the buffers of a CUDA graph: store, score, select, attend."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cache import PagedCache
from tests.kernels.conformance import QUIET
from tests.kernels.interpreter import DEVICE, DTYPES, TOLERANCE, on_device
from vllm_quest.formats.auto.triton import attend_pages
from vllm_quest.kernels.triton import select_pages
from vllm_quest.kernels.triton.launch import split_count, split_total
from vllm_quest.kernels.triton.workspace import Workspace
from vllm_quest.scorers.minmax.triton import score_pages, score_scratch

HEADS, GROUP, BUDGET, MAX_ROWS = 2, 4, 6, 4
pytestmark = QUIET


@pytest.mark.parametrize("group_reduce", ["max", "softmax_mean"])
def test_steps_share_one_workspace(group_reduce) -> None:
    cache = PagedCache("triton", num_kv_heads=HEADS, block_size=16, head_size=64, dtype=DTYPES[0])
    requests = [cache.new_request() for _ in range(3)]
    cache.append(dict(zip(requests, [130, 9, 62], strict=True)))
    max_pages = 2 * 10
    workspace = Workspace.for_decode(
        max_rows=MAX_ROWS,
        num_heads=HEADS * GROUP,
        num_kv_heads=HEADS,
        head_size=64,
        max_pages=max_pages,
        budget_pages=BUDGET,
        page_size=8,
        score_elements=score_scratch(MAX_ROWS * HEADS, GROUP, max_pages, 64, group_reduce, DEVICE),
        device=DEVICE,
    )
    page_scores = torch.full((MAX_ROWS, HEADS, max_pages), torch.nan, device=DEVICE)
    page_indices = torch.full((MAX_ROWS, HEADS, BUDGET), 2**30, dtype=torch.int32, device=DEVICE)
    out = torch.full((MAX_ROWS, HEADS * GROUP, 64), torch.nan, dtype=DTYPES[0], device=DEVICE)
    for rows in ([0, 1, 2], [2, 0], [0, 0, 1, 2]):
        rows = [requests[row] for row in rows]
        cache.append(dict.fromkeys(rows, 1), padding=1)
        table, seq_lens, num_pages = cache.rows(rows)
        table = torch.nn.functional.pad(table, (0, 10 - table.shape[1]), value=2**30)
        if len(rows) == MAX_ROWS:  # two query tokens of one request: the earlier sees a token less
            seq_lens[0] -= 1
            num_pages[0] = (seq_lens[0] + 7) // 8
        query, reference, n = cache.random(len(rows), GROUP), cache.reference, len(rows)
        expected_scores = reference.score_pages(query, table, num_pages, 0.125, group_reduce)
        expected_indices = reference.select_pages(expected_scores, num_pages, BUDGET, 1, 2)
        expected = reference.attend_pages(query, table, seq_lens, expected_indices, 0.125)

        pages = cache.layout.views(cache.cache.to(DEVICE))
        query, table, seq_lens, num_pages = on_device(query, table, seq_lens, num_pages)
        scored = (query, pages.summary, table, num_pages, 0.125, group_reduce)
        scores = score_pages(*scored, out=page_scores[:n], workspace=workspace)
        selected = (scores, num_pages, BUDGET, 1, 2)
        indices = select_pages(*selected, out=page_indices[:n], workspace=workspace)
        attended = (query, pages.cache, table, seq_lens, indices, 8, 0.125)
        actual = attend_pages(*attended, out=out[:n], workspace=workspace)
        assert torch.equal(indices.cpu(), expected_indices)
        bound = TOLERANCE[DTYPES[0]]
        torch.testing.assert_close(actual.cpu(), expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("kernel", ["score", "attend"])
@pytest.mark.parametrize("tiles", [1, 3, 32, 1000])
def test_a_workspace_for_many_rows_fits_any_fewer(kernel, tiles) -> None:
    for pairs in range(1, 60):
        total = split_total(kernel, pairs, tiles, DEVICE)
        assert all(p * split_count(kernel, p, tiles, DEVICE) <= total for p in range(1, pairs + 1))


@pytest.mark.parametrize("kernel", ["score", "attend"])
def test_a_step_without_rows_has_a_launch_configuration(kernel: str) -> None:
    assert split_count(kernel, 0, 4, DEVICE) >= 1
