"""Which prefills are compared with which, and what is made of their scores."""

from __future__ import annotations

from statistics import fmean

import pytest

from benchmarks.accuracy.cells import DENSE
from benchmarks.accuracy.samples import Results, Score
from benchmarks.accuracy.studies.prefill_quality import GRADED, TASKS, arms_of, summaries
from vllm_quest.config import QuestConfigError

ARMS = arms_of(512, {"page_size": 8}, [128, 1024], [256])
COUNT = 3


def test_every_arm_is_compared_with_the_same_decoding_after_exact_prefill() -> None:
    arms = {(arm.prefill.decode_tail, arm.decode.token_budget, arm.chunk): arm for arm in ARMS}
    assert list(arms) == [
        (0, 512, None),
        (128, 512, None),
        (128, None, None),
        (1024, 512, None),
        (1024, None, None),
        (0, None, None),
        (0, None, 256),
    ]
    assert len({arm.name for arm in ARMS}) == len(ARMS)
    assert arms[1024, 512, None].exact == arms[0, 512, None]
    assert arms[0, None, 256].exact == arms[0, None, None]
    assert arms[0, None, 256].prefill.kv_dtype == "int4"
    assert [arm.engine for arm in ARMS].count(ARMS[0].engine) == 5
    assert arms[0, None, 256].engine != arms[0, None, None].engine


def test_tails_need_what_decode_tail_needs() -> None:
    with pytest.raises(QuestConfigError, match="decode_tail"):
        arms_of(512, {"group_reduce": "softmax_mean"}, [128], [])
    assert arms_of(512, {"group_reduce": "softmax_mean"}, [], []) == []


@pytest.fixture
def results(tmp_path) -> Results:
    """Scores of their own for every arm, task and sample, and one more sample that was not asked for."""
    results = Results(tmp_path / "scores.jsonl")
    for place, name in enumerate([DENSE, *(arm.name for arm in ARMS)]):
        for task in TASKS:
            for sample in range(COUNT + 1):
                nll = 1 + place * 10 ** -TASKS.index(task) + sample
                results.append(Score(name, task, sample, 1920, 5, nll, place % 2 == 0, 1.0, place / 8))
    return results


def test_changes_are_paired(results) -> None:
    """Samples differ by more than arms do, and every sample of an arm changes alike: no interval is left."""
    keys = [(task, sample) for task in TASKS for sample in range(COUNT)]
    found = list(summaries(results, keys, ARMS))
    assert [one["chunk"] for one in found] == [arm.chunk for arm in ARMS]
    weights = {task: 10 ** -TASKS.index(task) for task in TASKS}
    weights["mean"] = fmean(weights.values())
    exact = [1, 1, 0, 1, 0, 6, 6]  # places of what each arm is compared with; dense has place 0
    for place, (arm, base) in enumerate(zip(found, exact, strict=True), start=1):
        assert list(arm["tasks"]) == list(weights)
        for task, one in arm["tasks"].items():
            weight = weights[task]
            assert one["samples"] == COUNT * (4 if task == "mean" else 1)
            assert one["nll_to_dense"] == pytest.approx([place * weight] * 3)
            assert one["nll_to_exact_prefill"] == pytest.approx([(place - base) * weight] * 3)
            assert one["kl_to_exact_prefill"] == pytest.approx([(place - base) / 8] * 3)
            if task in (*GRADED, "mean"):
                assert one["exact_to_dense"] == [-(place % 2)] * 3
            else:
                assert "exact" not in one
