"""A scorer that is not part of the package, with a torch reference only, decodes in the real engine."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

import vllm_quest
from tests.engine.running import GREEDY, LAYERS, generate
from tests.toy_scorer import MeanKeyScorer
from vllm_quest.scorers import SCORERS

pytestmark = pytest.mark.engine


@pytest.fixture(autouse=True)
def mean_key() -> Iterator[None]:
    SCORERS[MeanKeyScorer.name] = MeanKeyScorer
    yield
    del SCORERS[MeanKeyScorer.name]


@pytest.fixture
def log() -> Iterator[list[str]]:
    """The plugin's messages, by a filter of its logger: vLLM resets handlers."""
    messages: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        messages.append(record.getMessage())
        return True

    logger = logging.getLogger("vllm.plugins.quest")
    logger.addFilter(keep)
    yield messages
    logger.removeFilter(keep)


@pytest.mark.parametrize("kv_dtype", ["auto", "int4"])
def test_a_scorer_from_outside_selects_pages(engine, prose, log, kv_dtype) -> None:
    quest = {"token_budget": 256, "page_size": 16, "scorer": "mean_key", "kv_dtype": kv_dtype}
    llm = engine(quest, max_num_batched_tokens=300, num_gpu_blocks_override=20, max_model_len=2048)
    assert any("Scorer mean_key runs its torch reference, slowly." in line for line in log)
    assert any("mean keys of 16 tokens 256 B" in line for line in log)
    before = vllm_quest.read_counters()
    generate(llm, [prose[:900], prose[2000:2100]])  # in chunks; one context is within the budget
    grown = {name: value - before[name] for name, value in vllm_quest.read_counters().items()}
    steps = GREEDY.max_tokens - 1
    assert grown["decode_rows_sparse"] == grown["decode_rows_dense_context"] == steps * LAYERS
    assert_means_are_those_of_the_keys(llm)


def assert_means_are_those_of_the_keys(llm) -> None:
    """Of every full page in blocks that have been used, where the cache has the keys as they are."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    for layer in runner.compilation_config.static_forward_context.values():
        pages = layer.impl.pages(layer.kv_cache)
        if not isinstance(pages.cache.key, torch.Tensor):
            return  # 4-bit codes: tests/kernels/test_joining.py
        keys = pages.cache.key.unflatten(2, (-1, 16))
        full = keys.abs().amax((1, 4)).gt(0).all(2)  # [B, P]
        assert full.sum() > 60
        means = pages.summary.mean.transpose(1, 2)[full]
        torch.testing.assert_close(means, keys.mean(3).transpose(1, 2)[full], rtol=1e-4, atol=1e-5)


def test_a_budget_that_covers_the_context_gives_the_dense_tokens(engine, prose) -> None:
    llm = engine({"token_budget": 2048, "scorer": "mean_key"})
    assert generate(llm, [prose[:900]]) == generate(engine(), [prose[:900]])
