"""How many pages a share of the mass takes, against plain loops on permuted and poisoned pages."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.accuracy.studies.mass import ESTIMATES, Ranking, choose, page_masses, pages_for
from benchmarks.accuracy.studies.mass_scorer import KERNELS, MassScorer
from vllm_quest.block import Block
from vllm_quest.config import QuestConfig
from vllm_quest.formats.auto import AutoCache

BLOCK, HEADS, GROUP, DIM, SCALE = 24, 2, 3, 5, 0.4
LENGTHS = torch.tensor([62, 62, 41], dtype=torch.int32)  # two rows of one request, one of another


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
        key=key,
        table=table,
        ranking=Ranking(torch.randn(3, HEADS, 9), -(-LENGTHS // 8), sink_pages=1, recent_pages=2),
    )


def masses(step, estimate: str) -> torch.Tensor:
    return page_masses(estimate, step.query, step.key, step.table, 8, SCALE, step.ranking)


def keys_of(step, row: int, head: int) -> torch.Tensor:
    places = [(step.table[row, i // BLOCK], i % BLOCK) for i in range(int(LENGTHS[row]))]
    return torch.stack([step.key[block, head, slot] for block, slot in places])


def test_the_scorer_keeps_every_key_and_none_behind_the_last() -> None:
    """Pages are filled in two steps, in blocks that another request has used."""
    block = Block(32, 8, 16, torch.float32, channel_major=True)
    config = QuestConfig(scorer=MassScorer.name, bounds_dtype="auto")
    parts = {
        name: torch.full((3, HEADS, *part.shape), 7.0)
        for name, part in MassScorer(config).parts(block, config.format).items()
    }
    key = torch.randn(13, HEADS, 16)
    cache = AutoCache(*(torch.zeros(3, HEADS, 32, 16) for _ in range(2)))
    summary = MassScorer(config).summary(parts, cache, block, None)
    slots = torch.tensor([*range(64, 75), -1, 75])
    for part in (slice(0, 5), slice(5, 13)):
        new = slots[part]
        real = new >= 0
        cache.key[new[real] // 32, :, new[real] % 32] = key[part][real]
        KERNELS.summarize(key[part], cache, summary, new)
    assert torch.equal(summary.keys[2, :, :11], key[:11].transpose(0, 1))
    assert torch.equal(summary.keys[2, :, 11], key[12])
    assert summary.keys[2, :, 12:16].isnan().all()
    assert summary.keys[2, :, 16:].eq(7).all()
    assert torch.equal(summary.bounds.values[2, :, 0, 1], key[:8].amax(0))


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
    chosen = choose(share, mass, step.ranking)
    for row in range(3):
        count = int(step.ranking.num_pages[row])
        kept = [0, count - 2, count - 1]
        for head in range(HEADS):
            wanted, reached = set(kept), float(mass[row, head, kept].sum())
            for page in step.ranking.scores[row, head, :count].argsort(descending=True).tolist():
                if page not in kept and reached < share:
                    wanted.add(page)
                    reached += float(mass[row, head, page])
            assert {page for page in chosen[row, head].tolist() if page >= 0} == wanted
    counted = pages_for(np.array([share]), mass, step.ranking)
    assert counted.tolist() == [int((chosen >= 0).sum())]
