"""Scorers broken on purpose lose retrieval, and the benchmark's own samples show it."""

from __future__ import annotations

import gc
from statistics import fmean

import pytest

from benchmarks.accuracy.samples import Sample
from benchmarks.accuracy.studies.broken_scorers import BROKEN
from benchmarks.accuracy.tasks import build
from vllm_quest.config import QuestConfig
from vllm_quest.tune.instrument import Continuation, Instrument

pytestmark = pytest.mark.engine

CONTEXT = 1024


@pytest.fixture(scope="module")
def needles(model) -> list[Sample]:
    from transformers import AutoTokenizer

    return build(AutoTokenizer.from_pretrained(model), CONTEXT, 20, 0, ["needle"])


def right_digits(model: str, scorer: str, samples: list[Sample]) -> float:
    """Share of the answers' digits that are the argmax; the blank before them tells nothing.

    At an eighth of the context: tight, so that it matters which pages are read.
    """
    config = QuestConfig(token_budget=CONTEXT // 8, scorer=scorer)
    small = {"kv_cache_memory_bytes": 1 << 28, "distributed_executor_backend": "uni"}
    instrument = Instrument(config, CONTEXT + 128, model=model, **small)
    try:
        return _right_digits(instrument, samples)
    finally:
        instrument.close()
        gc.collect()


def _right_digits(instrument: Instrument, samples: list[Sample]) -> float:
    right: list[bool] = []
    for context in dict.fromkeys(one.context for one in samples):
        chosen = [one for one in samples if one.context == context]
        results = instrument.score([Continuation(context, (*one.question, *one.answer)) for one in chosen])
        for positions, one in zip(results, chosen, strict=True):
            digits = one.answer[1:]
            right += [
                position.argmax == digit
                for position, digit in zip(positions[-len(digits) :], digits, strict=True)
            ]
    return fmean(right)


def test_a_broken_scorer_loses_what_the_sound_one_finds(model, needles) -> None:
    sound = right_digits(model, "minmax", needles)
    for scorer in BROKEN:
        assert right_digits(model, scorer.name, needles) < sound - 0.1
