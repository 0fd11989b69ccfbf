"""How many pages a share of the mass takes, against plain loops on permuted and poisoned pages."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.accuracy.studies.mass import ESTIMATES, choose, page_masses, pages_for
from vllm_quest.config import QuestConfig

CONFIG = QuestConfig(page_size=8, sink_pages=1, recent_pages=2)
BLOCK, HEADS, GROUP, DIM, SCALE = 24, 2, 3, 5, 0.4
LENGTHS = torch.tensor([61, 62, 41], dtype=torch.int32)  # two rows of one request, one of another


@pytest.fixture
def step() -> SimpleNamespace:
    torch.manual_seed(0)
    key = torch.full((7, HEADS, BLOCK, DIM), torch.nan)
    table = torch.tensor([[4, 1, 6], [4, 1, 6], [2, 5, 0]], dtype=torch.int32)
    for request, length in ((0, 62), (2, 41)):
        for position in range(length):
            key[table[request, position // BLOCK], :, position % BLOCK] = torch.randn(HEADS, DIM)
    return SimpleNamespace(
        query=torch.randn(3, HEADS * GROUP, DIM),
        pages=SimpleNamespace(key=key),
        rows=SimpleNamespace(block_table=table, seq_lens=LENGTHS, num_pages=-(-LENGTHS // 8)),
        scores=torch.randn(3, HEADS, 9),
    )


def masses(step, estimate: str) -> torch.Tensor:
    return page_masses(estimate, step.query, step.pages, step.rows, SCALE, CONFIG)


def keys_of(step, row: int, head: int) -> torch.Tensor:
    places = [(step.rows.block_table[row, i // BLOCK], i % BLOCK) for i in range(int(LENGTHS[row]))]
    return torch.stack([step.pages.key[block, head, slot] for block, slot in places])


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_mass_of_every_page(step, estimate) -> None:
    mass = masses(step, estimate)
    for row in range(3):
        for head in range(HEADS):
            pages = keys_of(step, row, head).split(8)
            expected = torch.zeros(len(pages))
            for q in step.query[row, head * GROUP : (head + 1) * GROUP]:
                weights = []
                for number, page in enumerate(pages):
                    logits = page @ q * SCALE
                    if estimate == "bound" and 1 <= number < len(pages) - 2:
                        bound = torch.maximum(q * page.amin(0), q * page.amax(0)).sum() * SCALE
                        logits = bound.expand(len(page))
                    if estimate == "mean key" and 1 <= number < len(pages) - 2:
                        logits = logits.mean().expand(len(page))
                    weights.append(logits.exp().sum())
                expected += torch.stack(weights) / sum(weights) / GROUP
            torch.testing.assert_close(mass[row, head, : len(pages)], expected)
            assert not mass[row, head, len(pages) :].any()


@pytest.mark.parametrize("share", [0.001, 0.5, 0.8, 0.99])
def test_pages_are_taken_until_they_have_the_share(step, share) -> None:
    mass = masses(step, "true mass")
    chosen = choose(share, step.scores, mass, step.rows.num_pages, CONFIG)
    for row in range(3):
        count = int(step.rows.num_pages[row])
        kept = [0, count - 2, count - 1]
        for head in range(HEADS):
            wanted, reached = set(kept), float(mass[row, head, kept].sum())
            for page in step.scores[row, head, :count].argsort(descending=True).tolist():
                if page not in kept and reached < share:
                    wanted.add(page)
                    reached += float(mass[row, head, page])
            assert {page for page in chosen[row, head].tolist() if page >= 0} == wanted
    counted = pages_for(np.array([share]), step.scores, mass, step.rows.num_pages, CONFIG)
    assert counted.tolist() == [int((chosen >= 0).sum())]
