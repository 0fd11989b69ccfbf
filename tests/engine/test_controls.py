"""Scorers broken on purpose lose retrieval, and the benchmark's own samples show it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from statistics import fmean

import pytest

from benchmarks.accuracy.controls import BROKEN, broken_scorer
from benchmarks.accuracy.samples import Sample
from benchmarks.accuracy.tasks import build
from vllm_quest.accuracy.instrument import Continuation, Instrument
from vllm_quest.config import QuestConfig

pytestmark = pytest.mark.engine

CONTEXT = 1024


@pytest.fixture(scope="module")
def recalls(model) -> list[Sample]:
    from transformers import AutoTokenizer

    return build(AutoTokenizer.from_pretrained(model), CONTEXT, 10, 0, ["key_value"])


@pytest.fixture(scope="module")
def quest(model) -> Iterator[Instrument]:
    """A quarter of the context."""
    config = QuestConfig(token_budget=CONTEXT // 4)
    small = {"kv_cache_memory_bytes": 1 << 28, "distributed_executor_backend": "uni"}
    instrument = Instrument(config, CONTEXT + 128, model=model, **small)
    yield instrument
    instrument.close()
    gc.collect()


def right_digits(instrument: Instrument, samples: list[Sample]) -> float:
    """Share of the answers' tokens that are the argmax."""
    results = instrument.score([Continuation(one.context, (*one.question, *one.answer)) for one in samples])
    right = [
        position.argmax == token
        for positions, one in zip(results, samples, strict=True)
        for position, token in zip(positions[-len(one.answer) :], one.answer, strict=True)
    ]
    return fmean(right)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_scorer_loses_what_the_sound_one_recalls(quest, recalls, name) -> None:
    sound = right_digits(quest, recalls)
    with broken_scorer(name):
        broken = right_digits(quest, recalls)
    assert broken < sound - 0.2
    assert right_digits(quest, recalls) == sound  # nothing of it is left
