"""Contexts that are prefilled approximately: as if their end had been decoded, in chunks, and once."""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.accuracy.samples import Sample
from benchmarks.accuracy.studies.prefill_quality import Prefilling, _one_more
from vllm_quest.config import QuestConfig
from vllm_quest.tune.instrument import Continuation, Instrument

pytestmark = pytest.mark.engine

SMALL = {"kv_cache_memory_bytes": 1 << 28, "distributed_executor_backend": "uni"}
SPARSE = QuestConfig(token_budget=128, page_size=8, dense_layers=0)
CONTEXT, TAIL = 512, 205


def logprobs(positions) -> np.ndarray:
    return np.array([position.logprob for position in positions])


def test_the_end_of_a_context_is_decoded_like_what_follows(model, prose) -> None:
    """Cached by one request and continued by others, it equals a tail that reaches back into the context."""
    cases = [
        Continuation(tuple(prose[:CONTEXT]), tuple(prose[start : start + 24])) for start in (CONTEXT, 7000)
    ]
    instrument = Prefilling(SPARSE, 1024, model=model, **SMALL)

    def score(tail: int, decode: QuestConfig) -> np.ndarray:
        instrument.prefill = replace(SPARSE, decode_tail=tail)
        instrument.configure(decode)
        return np.array([logprobs(positions) for positions in instrument.score(cases)])

    try:
        got, after_exact = score(TAIL, SPARSE), score(0, SPARSE)
        dense = score(TAIL, replace(SPARSE, token_budget=None))
        again = score(TAIL, SPARSE)
    finally:
        instrument.close()
    gc.collect()
    plain = Instrument(SPARSE, 1024, model=model, **SMALL)
    try:
        expected = plain.score(
            [Continuation(case.context[:-TAIL], (*case.context[-TAIL:], *case.tokens)) for case in cases]
        )
    finally:
        plain.close()
    np.testing.assert_allclose(got, [logprobs(positions[TAIL:]) for positions in expected], atol=1e-3)
    np.testing.assert_allclose(again, got, atol=1e-3)
    assert np.abs(after_exact - got).max() > 0.02
    assert np.abs(dense - got).max() > 0.02


def test_stepping_leaves_the_context_as_its_chunks_left_it(model, prose, monkeypatch) -> None:
    """The whole context comes from the cache, where each chunk put it once."""
    config = QuestConfig(token_budget=None, kv_dtype="int4")
    instrument = Prefilling(
        config, 1024, model=model, max_num_batched_tokens=256, enable_chunked_prefill=True, **SMALL
    )
    instrument.prefill = config
    generate, cached = instrument.llm.generate, []

    def recorded(*arguments, **keywords):
        outputs = generate(*arguments, **keywords)
        cached.append([output.num_cached_tokens for output in outputs])
        return outputs

    monkeypatch.setattr(instrument.llm, "generate", recorded)
    sample = _one_more(Sample("prose", "0", tuple(prose[:CONTEXT]), tuple(prose[512:520]), (1, 2, 3)))
    assert sample.context == tuple(prose[:513])
    try:
        (positions,) = instrument.score([Continuation(sample.context, (*sample.question, *sample.answer))])
    finally:
        instrument.close()
    assert cached == [[0], [CONTEXT]]
    assert len(positions) == len(sample.question) + len(sample.answer) - 1
