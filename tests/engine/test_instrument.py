"""Teacher forcing: the fast way, stepping and plain prefill agree wherever they must."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from vllm import LLM, SamplingParams

import vllm_quest
from benchmarks.accuracy.engine import References, measure
from benchmarks.accuracy.samples import Sample, Score
from tests.engine.running import KV_HEADS, LAYERS
from vllm_quest.config import QuestConfig
from vllm_quest.tune.instrument import Continuation, Instrument

pytestmark = pytest.mark.engine

SMALL = {"kv_cache_memory_bytes": 1 << 28, "distributed_executor_backend": "uni"}
BASE = QuestConfig(token_budget=128)


@pytest.fixture(scope="module")
def cases(prose) -> list[Continuation]:
    """A context of whole blocks; one that the tail carries into another block; likewise, longer."""
    spans = [(0, 512, 24), (3000, 3485, 17), (6000, 6490, 40)]
    return [
        Continuation(tuple(prose[start:end]), tuple(prose[end : end + length]))
        for start, end, length in spans
    ]


@pytest.fixture(scope="module")
def dense(model) -> Iterator[Instrument]:
    instrument = Instrument(None, 1024, model=model, **SMALL)
    yield instrument
    instrument.close()
    gc.collect()


@pytest.fixture(scope="module")
def quest(model) -> Iterator[Instrument]:
    instrument = Instrument(replace(BASE, decode_tail=24), 1024, model=model, **SMALL)
    yield instrument
    instrument.close()
    gc.collect()


def logprobs(results) -> np.ndarray:
    return np.array([position.logprob for positions in results for position in positions])


def test_dense_decode_agrees_with_prefill(dense, cases) -> None:
    prefill = logprobs(dense.score(cases))
    assert len(prefill) == sum(len(case.tokens) - 1 for case in cases)
    assert np.ptp(prefill) > 1
    np.testing.assert_allclose(logprobs(dense.score_by_stepping(cases)), prefill, atol=1e-3)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        pytest.param(BASE, 3, id="base"),
        pytest.param(
            QuestConfig(token_budget=128, dense_layers=2, group_reduce="mean", sink_pages=2, recent_pages=1),
            2,
            id="mean",
        ),
        pytest.param(QuestConfig(token_budget=128, dense_layers=1, min_context=490), 2, id="min_context"),
    ],
)
def test_the_fast_way_equals_stepping(dense, quest, cases, config, count) -> None:
    """Also in what is read, and whatever another configuration left in the cache."""
    cases = cases[:count]
    quest.configure(config)
    counters = [vllm_quest.read_counters()]
    fast = logprobs(quest.score(cases))
    counters.append(vllm_quest.read_counters())
    stepped = logprobs(quest.score_by_stepping(cases))
    counters.append(vllm_quest.read_counters())
    np.testing.assert_allclose(fast, stepped, atol=1e-3)
    assert np.abs(fast - logprobs(dense.score(cases))).max() > 0.1, "these budgets show"
    rows = [
        after["decode_rows_sparse"] - before["decode_rows_sparse"] for before, after in pairwise(counters)
    ]
    assert rows[0] - rows[1] == count * (LAYERS - config.dense_layers), "stepping skips the last token"


def test_a_budget_that_covers_the_context_is_dense(dense, quest, cases) -> None:
    quest.configure(QuestConfig(token_budget=1024))
    np.testing.assert_allclose(logprobs(quest.score(cases)), logprobs(dense.score(cases)), atol=1e-3)


def test_where_tokens_do_not_step_alike_they_are_stepped(quest, cases) -> None:
    config = QuestConfig(token_budget=128, group_reduce="softmax_mean")
    assert not config.steps_alike
    quest.configure(config)
    short = [Continuation(cases[0].context, cases[0].tokens[:4])]
    np.testing.assert_allclose(
        logprobs(quest.score(short)), logprobs(quest.score_by_stepping(short)), atol=1e-3
    )


@pytest.fixture(scope="module")
def samples(prose) -> dict[tuple[str, int], Sample]:
    """Two contexts of one length; questions and answers of many."""
    cut = [(0, 9, 4, 0), (0, 2, 5, 4), (4000, 3, 7, 0)]
    return {
        ("task", index): Sample(
            "task",
            f"at {start}",
            tuple(prose[start : start + 512]),
            tuple(prose[start + 512 : start + 512 + question]),
            tuple(prose[start + 512 + question : start + 512 + question + answer]),
            distractors=(tuple(prose[:3]),) if start else (),
            generate=generate,
        )
        for index, (start, question, answer, generate) in enumerate(cut)
    }


def scores_of(instrument: Instrument, samples, references: References) -> list[Score]:
    return measure(instrument, "any", samples, references, lambda _, text: float(len(text)))


def test_many_contexts_at_once_and_stepping_change_no_score(
    dense, quest, samples, tmp_path, monkeypatch
) -> None:
    """As GPUs take them: everything in one batch, token by token."""
    references = References(tmp_path / "references.jsonl")
    scores_of(dense, samples, references)
    quest.configure(BASE)
    alone = [scores_of(quest, {key: sample}, references)[0] for key, sample in samples.items()]
    together = scores_of(quest, samples, references)
    monkeypatch.setattr(quest, "has_tail", False)
    stepped = scores_of(quest, samples, references)
    assert np.ptp([score.nll for score in alone]) > 0.1
    assert [score.rougeL is None for score in alone] == [True, False, True]
    for scores, last in ((together, 0), (stepped, 1)):
        for one, same in zip(alone, scores, strict=True):
            assert (same.exact, same.rank, same.rougeL) == (one.exact, one.rank, one.rougeL)
            np.testing.assert_allclose((same.nll, same.kl), (one.nll, one.kl), atol=1e-3)
            sample = samples[same.task, same.sample]
            rows = len(sample.question) + len(sample.answer) - last
            assert same.counters["decode_rows_sparse"] == rows * LAYERS
            assert same.counters["pages_read"] == rows * LAYERS * KV_HEADS * BASE.budget_pages
    read = [sum(score.counters["bytes_read"] for score in scores) for scores in (alone, together)]
    assert read[0] == pytest.approx(read[1], abs=len(samples))


def test_on_a_gpu_dense_attention_steps_too(dense, monkeypatch) -> None:
    assert not dense.is_stepping
    monkeypatch.setattr(dense, "has_tail", False)
    assert dense.is_stepping


def test_an_order_of_measurements_changes_nothing(quest, cases) -> None:
    """The prefix cache hands no configuration what another one computed."""
    first = logprobs(quest_with(quest, BASE).score(cases))
    quest_with(quest, QuestConfig(token_budget=64, sink_pages=0)).score(cases)
    np.testing.assert_allclose(logprobs(quest_with(quest, BASE).score(cases)), first, atol=1e-4)


def quest_with(instrument: Instrument, config: QuestConfig) -> Instrument:
    instrument.configure(config)
    return instrument


def test_generation_goes_on_as_the_engine_does(quest, cases) -> None:
    """Forced tokens, then the engine's own: those that teacher forcing finds likeliest."""
    quest.configure(BASE)
    (generated,) = quest.generate(cases[:1], 8)
    (positions,) = quest.score([Continuation(cases[0].context, cases[0].tokens + generated)])
    assert tuple(position.argmax for position in positions[len(cases[0].tokens) - 1 :]) == generated
    assert generated


def test_another_page_size_needs_another_engine(quest) -> None:
    with pytest.raises(Exception, match="page_size"):
        quest.configure(QuestConfig(page_size=32))
    assert quest.config is not None
    assert quest.config.page_size == BASE.page_size


def test_decode_tail_needs_whole_prompts(model) -> None:
    with pytest.raises(ValueError, match="no-enable-chunked-prefill") as error:
        LLM(
            model=model,
            attention_backend="QUEST",
            additional_config={"quest": {"decode_tail": 8}},
            dtype="float32",
            max_model_len=1024,
            **SMALL,
        )
    assert "decode_tail is 8" in str(error.value)


def test_decode_tail_in_plain_generate(quest, cases) -> None:
    """As a harness has it: the end of any prompt decodes, and what follows."""
    case = cases[0]
    # Earlier tests cached the context in larger batches: sums differ, and may decide between close pages.
    assert quest.llm.reset_prefix_cache()
    quest.configure(BASE)
    (expected,) = quest.score([case])
    quest.configure(replace(BASE, decode_tail=len(case.tokens)))
    (output,) = quest.llm.generate(
        [{"prompt_token_ids": [*case.context, *case.tokens]}],
        SamplingParams(max_tokens=1, prompt_logprobs=0),
        use_tqdm=False,
    )
    got = output.prompt_logprobs[1 - len(case.tokens) :]
    np.testing.assert_allclose(
        [entry[token].logprob for entry, token in zip(got, case.tokens[1:], strict=True)],
        [position.logprob for position in expected],
        atol=1e-3,
    )
