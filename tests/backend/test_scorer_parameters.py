"""A scorer that keeps something per token and needs to know of each layer, through the backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.backend.harness import BLOCK_SIZE, HEAD_SIZE, KV_HEADS, Engine, inputs
from tests.toy_token_scorer import ProjectedKeyScorer, direction
from vllm_quest.backend.cpu import QuestCPUBackend
from vllm_quest.scorers import SCORERS

QUEST = {"token_budget": 48, "page_size": 8, "scorer": ProjectedKeyScorer.name}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    SCORERS[ProjectedKeyScorer.name] = ProjectedKeyScorer
    ProjectedKeyScorer.loaded.clear()
    yield
    del SCORERS[ProjectedKeyScorer.name]


@pytest.mark.parametrize("kv_dtype", ["auto", "int4"])
def test_every_layer_has_parameters_of_its_own(kv_dtype) -> None:
    engine = Engine(QuestCPUBackend, QUEST | {"kv_dtype": kv_dtype, "page_size": 16}, poison=1e3)
    assert ProjectedKeyScorer.loaded == list(engine.layers)
    engine.step([(0, 100, True)], seed=0)
    engine.step([(0, 1, False), (1, 30, True)], seed=1)
    assert ProjectedKeyScorer.loaded == list(engine.layers), "once"
    position = torch.arange(101)
    slots = engine.tables[0].long()[position // BLOCK_SIZE], position % BLOCK_SIZE
    for index, (name, layer) in enumerate(engine.layers.items()):
        keys = torch.cat((inputs(100, index, 0)[1], inputs(31, index, 1)[1][:1]))
        expected = (keys * direction(name, KV_HEADS, HEAD_SIZE)).sum(-1)
        summary = layer.impl.pages(engine.caches[index]).summary
        torch.testing.assert_close(summary.projection[slots[0], :, slots[1]], expected)


def test_its_pages_are_read() -> None:
    """Those whose tokens project furthest, next to the first and the last ones: against attention to them."""
    engine = Engine(QuestCPUBackend, QUEST, poison=1e3)
    engine.step([(0, 100, True)], seed=0)
    outputs = engine.step([(0, 1, False)], seed=1)
    for index, (name, output) in enumerate(zip(engine.layers, outputs, strict=True)):
        query, key, value = inputs(1, index, 1)
        keys, values = (
            torch.cat((old, new)) for old, new in zip(inputs(100, index, 0)[1:], (key, value), strict=True)
        )
        for head in range(KV_HEADS):
            group = query[0, 3 * head : 3 * head + 3]
            along = direction(name, KV_HEADS, HEAD_SIZE)[head]
            projected = (group @ along)[:, None] * (keys[:, head] @ along)
            best = [float(page.max()) for page in projected.split(8, dim=1)]
            others = sorted(range(1, 11), key=lambda page: -best[page])[:3]
            tokens = [t for page in (0, *others, 11, 12) for t in range(8 * page, min(8 * page + 8, 101))]
            logits = group @ keys[tokens, head].T * HEAD_SIZE**-0.5
            expected = logits.softmax(-1) @ values[tokens, head]
            torch.testing.assert_close(output[0, 3 * head : 3 * head + 3], expected, rtol=1e-4, atol=1e-5)
