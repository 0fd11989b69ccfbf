"""What is Triton's own of selection: a million tokens, the buffers of CUDA graphs, checks."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreter import DEVICE, on_device
from tests.kernels.test_select import assert_selects, scores_of, select
from vllm_quest.kernels import reference
from vllm_quest.kernels.triton import select_pages
from vllm_quest.kernels.triton.workspace import Workspace, select_scratch


@pytest.mark.parametrize(("kind", "budget"), [("normal", 256), ("ties", 1024)])
def test_a_million_tokens(kind, budget) -> None:
    """131,072 pages; with 1024 pages of each of the 64 chunks the candidates outnumber a chunk."""
    assert_selects("triton", scores_of(kind, (1, 1, 131072)), [131071], budget, 1, 2)


def test_nan_scores_select_pages_of_the_context() -> None:
    scores = torch.full((1, 1, 100), torch.nan)
    scores[..., 40:50] = -scores[..., 40:50]
    selected = select("triton", scores, [90], 20, 1, 2).flatten().tolist()
    assert selected == sorted(set(selected))
    assert {0, 88, 89} <= set(selected) <= set(range(90))


def test_persistent_buffers_serve_one_step_after_another() -> None:
    workspace = Workspace.allocate(select_scratch(2, 9000, 100), 2, DEVICE)
    out = torch.full((2, 1, 100), 7, dtype=torch.int32, device=DEVICE)
    for seed, pages in enumerate([[9000, 5], [2100, 9000], [0, 120]]):
        scores, num_pages = scores_of("normal", (2, 1, 9000), seed), torch.tensor(pages, dtype=torch.int32)
        arguments = (scores, num_pages, 100, 1, 2)
        assert select_pages(*on_device(*arguments), out=out, workspace=workspace) is out
        assert torch.equal(out.cpu(), reference.select_pages(*arguments))
        assert not workspace.arrivals.any()


def test_what_the_kernel_relies_on_is_checked() -> None:
    scores, num_pages = torch.zeros(1, 1, 8), torch.tensor([8], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"budget_pages: 2; allowed: at least 1 \+ 2"):
        select_pages(scores, num_pages, 2, 1, 2)
    with pytest.raises(ValueError, match=r"page_scores: torch.float16"):
        select_pages(scores.half(), num_pages, 4, 1, 2)
    with pytest.raises(ValueError, match=r"out: \(1, 1, 5\) torch.int32; needed: \(1, 1, 4\) int32"):
        select_pages(scores, num_pages, 4, 1, 2, out=torch.zeros(1, 1, 5, dtype=torch.int32))
