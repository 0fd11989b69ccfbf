"""Formats that others have, simulated in the engine: what attention reads is what they would hold."""

from __future__ import annotations

import gc

import pytest

from benchmarks.accuracy.studies.formats import SIMULATED, flexgen, int4_per_token_head
from vllm_quest.config import QuestConfig
from vllm_quest.tune.instrument import Continuation, Instrument

pytestmark = pytest.mark.engine

ROUNDINGS = {
    "flexgen": flexgen,
    "int4_per_token_head": int4_per_token_head,
    "int4_per_token_head_exact_prompts": int4_per_token_head,
}
assert ROUNDINGS.keys() == SIMULATED.keys()


@pytest.mark.parametrize("name", ROUNDINGS)
def test_the_cache_holds_what_the_format_would(model, prose, name) -> None:
    """And a prompt is computed from it where the format's own engine would do so: by vLLM's dense kernel."""
    context, question = tuple(prose[:256]), tuple(prose[256:276])
    dense, simulated = (
        scored(model, QuestConfig(token_budget=None, kv_dtype=kv_dtype), context, question)
        for kv_dtype in ("auto", name)
    )
    for exact, caches in zip(dense, simulated, strict=True):
        for before, after in zip(exact, caches, strict=True):
            written = after[after.flatten(1).any(1)]
            change = (ROUNDINGS[name](written) - written).abs().flatten(1).amax(1)
            assert (change < 1e-4).sum() >= 3  # the request's, of 276 tokens in blocks of 128
            assert not before.equal(after)
    # The last layer's keys follow from everything that prompts have read.
    exact, written = ROUNDINGS[name](dense[-1][0]), simulated[-1][0]
    same = ((written - exact).abs().amax((1, 3)) < 1e-3) & written.abs().amax((1, 3)).gt(0)  # [B, N]
    assert same.sum() >= 256 if not SIMULATED[name].is_dense else same.sum() < 26


def scored(model, config: QuestConfig, context, question) -> list[tuple]:
    """K and V of every layer's cache, after a context and a question."""
    instrument = Instrument(
        config,
        512,
        model=model,
        kv_cache_memory_bytes=1 << 26,
        distributed_executor_backend="uni",
    )
    try:
        instrument.score([Continuation(context, question)])
        layers = instrument.llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
        return [tuple(part.clone() for part in layer.impl.pages(layer.kv_cache).cache) for layer in layers]
    finally:
        instrument.close()
        gc.collect()
