"""A scorer and a format that are not part of the package join by a line, with a reference only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.kernels.cache import PagedCache
from tests.kernels.conformance import INT4, any_history, run_steps
from tests.toy_format import RoundedFormat
from tests.toy_scorer import MeanKeyScorer
from vllm_quest.config import QuestConfig
from vllm_quest.formats import FORMATS
from vllm_quest.kernels.operations import Operations, Rows, Shapes
from vllm_quest.page import PageLayout
from vllm_quest.scorers import SCORERS

INT4_CACHE = INT4 | {"block_size": 64, "head_size": 64}
SHAPES = Shapes(6, 2, 4, 80, False, torch.device("cpu"))
MEAN_KEY = {"scorer": "mean_key"}
ROUNDED = {"kv_dtype": "rounded"}
# Entries beside the kinds whose reference a CPU runs.
JOINED = [
    (MEAN_KEY, ["scorer"]),
    (MEAN_KEY | INT4_CACHE, ["scorer"]),
    (ROUNDED, ["format"]),
    (ROUNDED | {"bounds_dtype": "int8"}, ["format"]),
    (MEAN_KEY | ROUNDED, ["format", "scorer"]),
]
EVERY_JOINED = pytest.mark.parametrize(("entries", "references"), JOINED)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    SCORERS["mean_key"], FORMATS["rounded"] = MeanKeyScorer, RoundedFormat
    yield
    del SCORERS["mean_key"], FORMATS["rounded"]


def operations_of(cache: PagedCache, device: str, **changes) -> Operations:
    return Operations(cache.layout, replace(cache.config, **changes), device, SHAPES)


@EVERY_JOINED
def test_a_cpu_stores_what_the_reference_stores(entries, references) -> None:
    def check(steps, seed) -> None:
        cache, expected = PagedCache(seed=seed, **entries), PagedCache(seed=seed, **entries)
        operations = operations_of(cache, "cpu")
        assert operations.references == references

        def store(key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
            operations.store(key, value, cache.pages, slots)
            expected.store(key, value, slots)

        run_steps(cache, steps, store=store)
        assert torch.equal(cache.cache.view(torch.uint8), expected.cache.view(torch.uint8))

    any_history(5, check)


@EVERY_JOINED
@pytest.mark.parametrize("budget", [4, 40])
def test_a_step_on_a_cpu_is_the_references(entries, references, budget) -> None:
    """Score, selected pages and output; of a budget that covers every page, dense attention."""
    cache = PagedCache(**entries)
    requests = [cache.new_request() for _ in range(3)]
    cache.append(dict(zip(requests, [203, 9, 62], strict=True)), padding=1)
    rows, query, reference = Rows(*cache.rows(requests)), cache.random(3, 3), cache.reference
    operations = operations_of(cache, "cpu", token_budget=8 * budget)
    scores = operations.score_pages(query, cache.pages, rows, 0.2)
    expected = reference.score_pages(query, rows.block_table, rows.num_pages, 0.2)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=3e-5)
    pages = operations.select_pages(scores, rows)
    assert torch.equal(pages, reference.select_pages(scores, rows.num_pages, budget, 1, 2))
    out = operations.attend_pages(query, cache.pages, rows, pages, 0.2)
    read = (pages if budget == 4 else None, 0.2)
    expected = reference.attend_pages(query, rows.block_table, rows.seq_lens, *read)
    torch.testing.assert_close(out, expected, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("entries", [MEAN_KEY, MEAN_KEY | INT4_CACHE])
def test_mean_keys_follow_every_write(entries) -> None:
    def check(steps, seed) -> None:
        cache = PagedCache(seed=seed, **entries)
        run_steps(cache, [step for step in steps if step[0] != "reject"])
        for context in cache.requests.values():
            for page in range(context.num_pages(8)):
                block, within = divmod(page, cache.layout.block.pages)
                stored = cache.pages.summary.mean[context.blocks[block], :, within].numpy()
                np.testing.assert_allclose(stored, context.page(page, 8).mean(0), rtol=1e-4, atol=1e-5)

    any_history(10, check)


@EVERY_JOINED
def test_a_gpu_refuses_them_by_name(entries, references) -> None:
    cache = PagedCache(**entries)
    name = cache.layout.format.name if "format" in references else cache.layout.scorer.name
    message = rf"^additional_config\['quest'\]: {references[0]} '{name}' has no kernels for triton; it has: "
    with pytest.raises(ValueError, match=message):
        operations_of(cache, "triton")


def test_parts_of_the_same_name_are_refused() -> None:
    class Clash(MeanKeyScorer):
        def parts(self, block, kv_format):
            return {"kv": super().parts(block, kv_format)["mean_key"]}

    SCORERS["mean_key"] = Clash
    config = QuestConfig(scorer="mean_key")
    with pytest.raises(ValueError, match=r"format auto and scorer mean_key both have parts \['kv'\]"):
        PageLayout.configured(config, 32, 32, torch.float32, for_cpu=True)
