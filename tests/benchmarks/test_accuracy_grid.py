"""Which configurations a grid measures, and that its results survive an interruption."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from itertools import chain

import pytest

from benchmarks.accuracy import configurations, sample_file
from benchmarks.accuracy.engine import References
from benchmarks.accuracy.grid import Grid
from benchmarks.accuracy.samples import Header, Results, Sample, Score, batches
from vllm_quest.config import SELECTION_FIELDS, QuestConfig, QuestConfigError
from vllm_quest.tune.instrument import Position

BASE = QuestConfig(token_budget=512)


@pytest.mark.parametrize("context", [1024, 4096, 8192])
def test_standard_configurations_differ_and_have_names_of_their_own(context) -> None:
    chosen = configurations.standard(context)
    assert len({str(asdict(config)) for config in chosen.values()}) == len(chosen)
    assert all(configurations.name_of(config) == name for name, config in chosen.items())


def test_one_at_a_time_and_crossed() -> None:
    factors = {"page_size": [16, 32], "dense_layers": [2, 1]}
    alone = configurations.one_at_a_time(BASE, factors)
    assert list(alone) == [
        "token_budget=512",
        "token_budget=512 page_size=16",
        "token_budget=512 page_size=32",
        "token_budget=512 dense_layers=2",
        "token_budget=512 dense_layers=1",
    ]
    crossed = configurations.crossed(BASE, factors)
    assert len(crossed) == 4
    assert "token_budget=512 page_size=32 dense_layers=1" in crossed


def test_an_engine_serves_what_reads_the_same_cache() -> None:
    factors = {"page_size": [16, 8], "dense_layers": [0, 1], "group_reduce": ["max", "softmax_mean"]}
    groups = configurations.by_cache(configurations.crossed(BASE, factors))
    assert [len(group) for group in groups] == [4, 4]
    for group in groups:
        assert len({str(config.cache_fields) for config in group.values()}) == 1


def test_every_field_is_either_of_the_cache_or_of_the_selection() -> None:
    names = {field.name for field in fields(QuestConfig)}
    assert set(SELECTION_FIELDS) < names
    assert set(BASE.cache_fields) == names - set(SELECTION_FIELDS)
    assert "page_size" in BASE.cache_fields


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("token_budget=null,512", ("token_budget", [None, 512])),
        ("group_reduce=max,mean", ("group_reduce", ["max", "mean"])),
    ],
)
def test_fields_on_the_command_line(text, expected) -> None:
    assert configurations.parse_field(text) == expected
    with pytest.raises(QuestConfigError, match="names no value"):
        configurations.parse_field("page_size")


def score(sample: int) -> Score:
    return Score("a", "needle", sample, 4096, 5, 0.5, True, 1.0, 0.0, counters={"pages_read": 3})


def test_results_go_on_after_a_line_that_was_cut_off(tmp_path) -> None:
    path = tmp_path / "model-4096.jsonl"
    header = Header("a", asdict(BASE), 1.5, 128, "model", 4096, 0.1, {}, {}, "command", "date")
    results = Results(path)
    for record in (header, score(0), score(1)):
        results.append(record)
    path.write_text(path.read_text()[:-20])
    again = Results(path)
    assert again.headers == {"a": header}
    assert again.scores == [score(0)]
    assert again.has("a", "needle", 0)
    assert not again.has("a", "needle", 1)
    again.append(score(1))
    assert [results.path for results in Results.in_folder(tmp_path)] == [path]
    assert Results(path).scores == [score(0), score(1)]


def test_a_name_that_meant_something_else_is_refused(tmp_path) -> None:
    """As where a default has changed since: its scores would be taken for those of the new configuration."""
    grid = Grid("model", 4096, {}, {"a": BASE}, tmp_path, lambda *_: 0.0)
    for config in (BASE, replace(BASE, page_size=16)):
        header = Header("a", asdict(config), 1.5, 128, "model", 4096, 0.1, {}, {}, "command", "date")
        grid.results.append(header)
        if config == BASE:
            grid.run()
    with pytest.raises(ValueError, match=r"'a' was measured as .*'page_size': 16.*now it means"):
        grid.run()


def sample(context: int) -> Sample:
    tokens = tuple(range(context, context + 7))
    return Sample(
        "needle", f"needle-0-{context}", tokens, (1, 2), (3,), distractors=((4,), (5, 6)), generate=2
    )


SAMPLES = {("needle", index): replace(sample(index // 2), answer=(index,)) for index in range(10)}
ORIGIN = sample_file.Origin("model", 4096, 0)


@pytest.mark.parametrize("at_once", [1, 2, 3, 5, 9])
def test_every_sample_is_in_one_batch_with_its_context(at_once) -> None:
    found = list(batches(SAMPLES, at_once))
    assert list(chain.from_iterable(found)) == list(SAMPLES)
    held = [{SAMPLES[key].context_id for key in batch} for batch in found]
    assert [len(contexts) for contexts in held[:-1]] == [at_once] * (len(held) - 1)
    assert sum(map(len, held)) == 5, "no context is in two batches"


def test_samples_come_back_from_a_file(tmp_path) -> None:
    path = tmp_path / "samples.jsonl"
    origin = replace(ORIGIN, python="2.7.18")
    sample_file.save(path, origin, SAMPLES)
    found, samples = sample_file.load(path, ORIGIN, ["needle"], 7)
    assert found == origin
    assert samples == {key: SAMPLES[key] for key in list(SAMPLES)[:7]}


@pytest.mark.parametrize(
    ("wanted", "tasks", "count", "message"),
    [
        (replace(ORIGIN, seed=1), ["needle"], 10, "seed=0.*asked for.*seed=1"),
        (replace(ORIGIN, model="other"), ["needle"], 10, "model='other'"),
        (ORIGIN, ["needle"], 11, "lacks sample 10 of needle"),
        (ORIGIN, ["needle", "prose"], 10, "lacks sample 0 of prose"),
    ],
)
def test_other_samples_are_refused(tmp_path, wanted, tasks, count, message) -> None:
    path = tmp_path / "samples.jsonl"
    sample_file.save(path, ORIGIN, SAMPLES)
    with pytest.raises(ValueError, match=message):
        sample_file.load(path, wanted, tasks, count)


def test_references_come_back(tmp_path) -> None:
    answer = [Position(-0.5, {3: -0.5, 4: -1.5})]
    References(tmp_path / "r.jsonl").add(("needle", 2), answer)
    again = References(tmp_path / "r.jsonl")
    assert again["needle", 2] == answer
    assert ("needle", 1) not in again
