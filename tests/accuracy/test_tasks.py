"""Every task: exact lengths, determinism, and answers that are in the context and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest

from benchmarks.accuracy.samples import Sample
from benchmarks.accuracy.tasks import TASKS, TaskError, build, numbered, rouge_l, unranked
from benchmarks.accuracy.tasks.prompt import QUESTION_ROOM, plant
from benchmarks.accuracy.tasks.text import chapters, described_modules
from tools.small_model import prepare_model

COUNT = 50
FOUND_IN_CONTEXT = ("needle", "key_value", "single_document_qa", "multi_document_qa")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(prepare_model())


@pytest.fixture(scope="module", params=[2048, 8192])
def length(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module", params=TASKS)
def task(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def samples(tokenizer: Any, task: str, length: int) -> list[Sample]:
    return TASKS[task](tokenizer, length, COUNT, 0)


def test_lengths_are_exact(samples: list[Sample], length: int) -> None:
    assert len(samples) == COUNT
    assert {len(sample.context) for sample in samples} == {length - QUESTION_ROOM}
    for sample in samples:
        longest = max(map(len, (sample.answer, *sample.distractors)))
        assert len(sample.question) >= 1
        assert min(map(len, (sample.answer, *sample.distractors))) >= 1
        assert len(sample.question) + longest < QUESTION_ROOM
        assert len(sample.question) + sample.generate < QUESTION_ROOM


def test_a_context_serves_several_questions(samples: list[Sample], task: str) -> None:
    contexts = {sample.context_id: sample.context for sample in samples}
    assert all(sample.context == contexts[sample.context_id] for sample in samples)
    assert len(set(contexts.values())) == len(contexts) <= COUNT // 5
    assert {sample.task for sample in samples} == {task}
    assert len({(sample.context_id, sample.question) for sample in samples}) == COUNT


def test_the_answer_does_not_leak_into_the_question(samples: list[Sample], tokenizer: Any, task: str) -> None:
    for sample in samples:
        answer = tokenizer.decode(sample.answer).strip()
        assert answer.lower() not in tokenizer.decode(sample.question).lower()


def test_distractors_differ_from_the_answer_and_from_each_other(
    samples: list[Sample], tokenizer: Any
) -> None:
    for sample in samples:
        texts = [tokenizer.decode(tokens).strip() for tokens in (sample.answer, *sample.distractors)]
        assert all(one != other for one, other in combinations(texts, 2))


def test_the_answer_stands_once_in_the_context(samples: list[Sample], tokenizer: Any, task: str) -> None:
    for sample in samples:
        answer, context = tokenizer.decode(sample.answer).strip(), tokenizer.decode(sample.context)
        if task in FOUND_IN_CONTEXT:
            # The needle's note says its number twice, in the same breath.
            assert context.count(answer) == (2 if task == "needle" else 1)
        elif task == "code_completion":
            assert f"def {answer}" in context
        elif task == "few_shot":
            assert f" is a {answer}\n" in context
        else:
            assert answer not in context


@pytest.mark.parametrize("name", TASKS)
def test_equal_arguments_give_equal_samples_and_another_seed_others(tokenizer: Any, name: str) -> None:
    first, again = (TASKS[name](tokenizer, 2048, 12, 3) for _ in range(2))
    assert first == again
    assert TASKS[name](tokenizer, 2048, 6, 3) == first[:6]
    assert {s.context for s in first}.isdisjoint(s.context for s in TASKS[name](tokenizer, 2048, 12, 4))


def test_needles_cover_all_depths(tokenizer: Any) -> None:
    depths = []
    for sample in TASKS["needle"](tokenizer, 4096, COUNT, 0):
        context = tokenizer.decode(sample.context)
        depths.append(context.index(tokenizer.decode(sample.answer).strip()) / len(context))
    fifths = [int(5 * depth) for depth in depths]
    assert all(fifths.count(part) >= 5 for part in range(5))


def test_planting_keeps_every_fact_even_under_long_paragraphs(tokenizer: Any) -> None:
    from random import Random

    facts = [f"The number {number} is hidden here." for number in range(100, 125)]
    for seed in range(5):
        tokens = plant(tokenizer, facts, 1_000, Random(seed))
        assert len(tokens) == 1_000
        text = tokenizer.decode(tokens)
        assert all(text.count(fact) == 1 for fact in facts)


def test_facts_that_leave_no_room_for_prose_are_refused(tokenizer: Any) -> None:
    from random import Random

    with pytest.raises(TaskError, match="more than half"):
        plant(tokenizer, ["A fact of some ten tokens or so."] * 20, 100, Random(0))


@pytest.mark.parametrize("name", TASKS)
def test_a_context_longer_than_all_text_is_refused(tokenizer: Any, name: str) -> None:
    with pytest.raises(TaskError):
        TASKS[name](tokenizer, 20_000_000, 1, 0)


def test_build_gives_the_named_tasks_and_refuses_others(tokenizer: Any) -> None:
    built = build(tokenizer, 2048, 3, 0, ["prose", "needle"])
    assert [sample.task for sample in built] == ["prose"] * 3 + ["needle"] * 3
    with pytest.raises(TaskError, match=r"--tasks.*'nedle'.*needle"):
        build(tokenizer, 2048, 3, 0, ["nedle"])


def test_samples_are_numbered_within_each_task(tokenizer: Any) -> None:
    model = str(prepare_model())
    samples = numbered(model, 2048, 3, 7, ["prose", "needle"])
    assert list(samples) == [(name, index) for name in ("prose", "needle") for index in range(3)]
    assert list(samples.values()) == build(tokenizer, 2048, 3, 7, ["prose", "needle"])
    assert samples["needle", 0].distractors
    plain = unranked(samples)
    assert list(plain) == list(samples)
    assert all(plain[key] == replace(sample, distractors=()) for key, sample in samples.items())


def test_without_a_chat_template_questions_are_plain(tokenizer: Any) -> None:
    class Plain:
        chat_template = None
        encode = staticmethod(tokenizer.encode)

    sample = TASKS["needle"](Plain(), 2048, 1, 0)[0]
    assert "<|im_start|>" not in tokenizer.decode(sample.context + sample.question)
    assert len(sample.context) == 2048 - QUESTION_ROOM


def test_the_text_is_real_and_plenty() -> None:
    assert len(chapters()) > 40
    documents = described_modules()
    assert len(documents) > 50
    assert all(document.summary not in document.description for document in documents)


def test_rouge_counts_the_common_order_of_words() -> None:
    reference = "Abstract base classes for containers."
    assert rouge_l(reference, f" {reference}\nMore text.") == 1
    assert rouge_l(reference, "Entirely unrelated words") == 0
    # 3 of 5 and 3 of 3 words in order: F1 of recall .6 and precision 1.
    assert rouge_l(reference, "abstract base containers") == pytest.approx(0.75)
