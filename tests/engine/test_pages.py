"""Inside a running engine: the bounds are those of the cached keys, and the best pages by them are read."""

from __future__ import annotations

import numpy as np
import pytest
from vllm import SamplingParams

from tests.engine.running import KV_HEADS, LAYERS, generate
from tests.engine.spies import SCORER, SPIED
from vllm_quest.page import Pages

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("page_size", [8, 16, 64])
def test_engine_reads_the_pages_that_its_keys_ask_for(engine, prose, page_size) -> None:
    """Inside the engine: bounds equal those of the cached keys, and the selection is the best by them.

    Blocks are reused (few of them, several requests before), prompts are chunked and a prefix is cached.
    """
    quest = {"token_budget": 256, "page_size": page_size, "bounds_dtype": "auto", "scorer": SPIED}
    llm = engine(quest, max_num_batched_tokens=200, num_gpu_blocks_override=12, max_model_len=1280)
    generate(llm, [prose[5000:5700], prose[6000:6400]])
    generate(llm, [prose[:600]])
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    layers = runner.compilation_config.static_forward_context.values()
    caches = {page.summary.values.data_ptr(): page.cache.key for page in pages_of(layers)}
    checked = []

    def check(query, bounds, block_table, num_pages, scores, pages) -> None:
        seq_len = 901 + len(checked) // LAYERS  # one request, whose prompt has 900 tokens
        key_cache = caches[bounds.values.data_ptr()]
        check_step(query, bounds, block_table, num_pages, scores, key_cache, [seq_len], pages, page_size)
        checked.append(seq_len)

    SCORER.on_select = check
    try:
        generate(llm, [prose[:600] + prose[700:1000]], SamplingParams(max_tokens=4, temperature=0))
    finally:
        SCORER.on_select = None
    assert checked == [length for length in (901, 902, 903) for _ in range(LAYERS)]


def pages_of(layers) -> list[Pages]:
    """What each layer sees of its cache."""
    return [layer.impl.pages(layer.kv_cache) for layer in layers]


def check_step(query, bounds, block_table, num_pages, scores, key_cache, seq_lens, pages, size) -> None:
    per_block = key_cache.shape[2] // size
    group = query.shape[1] // KV_HEADS
    for row, length in enumerate(seq_lens):
        keys = key_cache[block_table[row].long()].movedim(2, 1).flatten(0, 1)[:length].numpy()  # [T, H, D]
        stored = (
            bounds.values[block_table[row].long()].movedim(2, 1).flatten(0, 1).numpy()
        )  # [pages, H, 2, D]
        starts = range(0, length, size)
        for page, start in enumerate(starts):
            np.testing.assert_array_equal(stored[page, :, 0], keys[start : start + size].min(0))
            np.testing.assert_array_equal(stored[page, :, 1], keys[start : start + size].max(0))
        assert len(starts) == num_pages[row] <= block_table.shape[1] * per_block
        for head in range(KV_HEADS):
            q = query[row, head * group : (head + 1) * group].double().numpy()
            low, high = (
                stored[: len(starts), head, 0].astype(float),
                stored[: len(starts), head, 1].astype(float),
            )
            best = np.maximum(q[:, None] * low, q[:, None] * high).sum(-1).max(0)
            np.testing.assert_allclose(
                scores[row, head, : len(starts)].numpy(), best, rtol=1e-4, atol=1e-5 * best.max()
            )
            chosen = [page for page in pages[row, head].tolist() if page >= 0]
            forced = {0, len(starts) - 2, len(starts) - 1}
            assert len(chosen) == 256 // size
            assert forced <= set(chosen)
            worst_chosen = min(best[page] for page in chosen if page not in forced)
            skipped = [best[page] for page in range(len(starts)) if page not in chosen]
            assert worst_chosen >= max(skipped) - 1e-4 * abs(max(skipped))
