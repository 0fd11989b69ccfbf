"""Formats that others have, simulated in the engine: what attention reads is what they would hold."""

from __future__ import annotations

import gc

import pytest

from benchmarks.accuracy.studies.formats import FORMATS, FormatWorker, flexgen, int4_per_token_head
from vllm_quest.tune.instrument import Continuation, Instrument
from vllm_quest.config import QuestConfig

pytestmark = pytest.mark.engine

ROUNDINGS = {
    "flexgen": flexgen,
    "int4_per_token_head": int4_per_token_head,
    "int4_per_token_head_exact_prompts": int4_per_token_head,
}
assert ROUNDINGS.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", ROUNDINGS)
def test_the_cache_holds_what_the_format_would(model, prose, name) -> None:
    instrument = Instrument(
        QuestConfig(token_budget=None),
        512,
        model=model,
        kv_cache_memory_bytes=1 << 26,
        distributed_executor_backend="uni",
    )
    try:
        # A process extends its workers once, here for the instrument; the engine has the same layers.
        engine = instrument.llm.llm_engine
        FormatWorker.store_like(engine, name)
        instrument.score([Continuation(tuple(prose[:256]), tuple(prose[256:276]))])
        for layer in engine.vllm_config.compilation_config.static_forward_context.values():
            pages = layer.impl.pages(layer.kv_cache)
            for cache in (pages.key, pages.value):
                written = cache[cache.flatten(1).any(1)]
                change = (ROUNDINGS[name](written) - written).abs().flatten(1).amax(1)
                assert (change < 1e-4).sum() >= 3  # the request's, of 276 tokens in blocks of 128
    finally:
        instrument.close()
        gc.collect()
