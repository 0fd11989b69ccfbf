"""The search and its arithmetic, without an engine."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from vllm_quest.config import QuestConfig
from vllm_quest.metrics import DIRECTORY_VARIABLE, CounterFile
from vllm_quest.tune import command
from vllm_quest.tune import search as tune
from vllm_quest.tune.instrument import Position
from vllm_quest.tune.probes import ProbeError, recall_samples, text_samples
from vllm_quest.tune.samples import Sample

CONTEXT = 4096


class Letters:
    """A tokenizer of single characters."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [ord(letter) for letter in text]


@pytest.mark.parametrize("enough", [128, 256, 512, 1024, 2048, 4096])
def test_bisection_finds_the_smallest_budget(enough) -> None:
    tried: list[QuestConfig] = []

    def try_one(config: QuestConfig) -> bool:
        tried.append(config)
        return config.token_budget >= enough

    tune.smallest_passing(QuestConfig(dense_layers=2), CONTEXT, try_one)
    assert len(tried) <= 3
    assert all(config.dense_layers == 2 for config in tried)
    passing = [config.token_budget for config in tried if config.token_budget >= enough]
    assert (min(passing) == enough) if enough <= 2048 else not passing


def test_budgets_hold_the_pages_that_are_always_read() -> None:
    for page_size in (8, 16, 32, 64):
        for budget in tune.budgets(512, QuestConfig(page_size=page_size)):
            assert QuestConfig(page_size=page_size, token_budget=budget).budget_pages > 3


@pytest.mark.parametrize(("dense_layers", "largest"), [(0, None), (2, 2048)])
def test_four_bits_are_tried_without_a_budget_too(dense_layers, largest) -> None:
    config = QuestConfig(kv_dtype="int4", dense_layers=dense_layers)
    assert tune.budgets(CONTEXT, config)[-1] == largest
    tried: list[QuestConfig] = []
    tune.smallest_passing(config, CONTEXT, lambda one: tried.append(one) or False)
    assert len(tried) <= 3
    assert tried[-1] == replace(config, token_budget=largest)


def test_the_report_has_columns_whatever_is_configured() -> None:
    options = SimpleNamespace(model="model", context=4096, max_loss=1.0, texts=["notes.txt"])
    dense = tune.Dense([], recall=80.0, kv_bytes_per_token=40.0, dtype="bfloat16")
    int4 = QuestConfig.from_dict({"kv_dtype": "int4", "value_group_size": 32, "token_budget": None})
    trials = [trial(config=int4), trial(read_share=0.2, text_loss=12.0, recall_loss=None)]
    title, *rows = command._report(options, dense, trials, trials[0]).splitlines()[3:6]
    assert len(title) == len(rows[1])
    assert title.index("reads") + len("reads") == rows[0].index("%") + 1 == rows[1].index("%") + 1
    assert rows[0].startswith("x token_budget=2048 page_size=8")
    assert rows[1].startswith("* token_budget=all page_size=16")


def test_an_uncertain_recommendation_names_a_certain_one() -> None:
    options = SimpleNamespace(model="model", context=4096, max_loss=1.0, texts=["notes.txt"])
    dense = tune.Dense([], recall=80.0, kv_bytes_per_token=40.0, dtype="bfloat16")
    certain, uncertain = trial(read_share=0.4), trial(text_error=0.7, config=QuestConfig(token_budget=512))
    forgetful = trial(read_share=0.2, recall_loss=30.0)
    lines = command._report(options, dense, [uncertain, certain, forgetful], uncertain).splitlines()
    assert "reaches +1.20 %" in lines[-1]
    assert lines[-1].endswith("token_budget=2048 page_size=8 dense_layers=0 reads least.")
    assert command._report(options, dense, [uncertain], uncertain).endswith("all of it, none is.")
    assert "reaches" not in command._report(options, dense, [certain], certain)


def trial(**changes) -> tune.Trial:
    fields = {
        "config": QuestConfig(),
        "text_loss": 0.5,
        "text_error": 0.1,
        "recall_loss": 0.0,
        "read_share": 0.3,
        "memory_share": 1.0,
    }
    return tune.Trial(**(fields | changes))


def test_the_cheapest_trial_within_the_loss() -> None:
    text, recall = trial(read_share=0.1, text_loss=1.2), trial(read_share=0.2, recall_loss=2.0)
    good, better = trial(read_share=0.4), trial(read_share=0.3, recall_loss=None)
    assert tune.cheapest([text, recall, good, better], 1.0) is better
    assert tune.cheapest([text, recall], 1.0) is None


def test_measured_loss_and_reads(monkeypatch, tmp_path) -> None:
    """Two layers, one dense: 10 decoded tokens, each reading a quarter in the sparse layer."""
    right, wrong = Position(-0.1, {7: -0.1, 8: -3.0}), Position(-1.1, {7: -1.1, 8: -0.2})
    text = Sample("text", "a", (1,) * 100, (2,), (7,))
    samples = [text, replace(text, question=(3,)), Sample("recall", "a", (1,) * 100, (2, 2, 2, 2), (7, 7))]
    dense = tune.Dense(
        [[right], [right], [right, right]], recall=100.0, kv_bytes_per_token=40.0, dtype="float32"
    )
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    counters = CounterFile()
    grown = {"decode_rows_sparse": 10, "decode_rows_dense_layer": 10, "bytes_read": 10 * 20 * 100 // 4}

    def score(continuations) -> list[list[Position]]:
        for name, amount in grown.items():
            counters.add(name, amount)
        return [[right], [wrong], [right, right, right, right, wrong]]

    instrument = SimpleNamespace(config=QuestConfig(), kv_bytes_per_token=44.0, score=score)
    result = tune.measure(instrument, samples, dense)
    assert result.text_loss == pytest.approx(100 * (2.718281828**0.5 - 1))
    assert result.recall_loss == 50
    assert result.memory_share == pytest.approx(1.1)
    assert result.read_share == pytest.approx((20 / 4 + 20) / 40)  # the dense layer reads no bounds


def test_probes_have_the_lengths_asked_for() -> None:
    samples = recall_samples(Letters(), 300, lists=2)
    assert len(samples) == 20
    assert {len(sample.context) for sample in samples} == {300}
    for sample in samples:
        listed = "".join(map(chr, sample.context[1:]))
        asked, answer = "".join(map(chr, sample.question)), "".join(map(chr, sample.answer))
        assert f"{asked.lstrip()}{answer}\n" in listed
        assert answer.isdigit()
        assert len(answer) == 4
    with pytest.raises(ProbeError, match=r"notes.txt has 6 tokens; allowed: at least 780"):
        text_samples(Letters(), {"notes.txt": "short"}, 300)


@pytest.mark.parametrize(("kv_dtypes", "groups"), [(["auto"], {None}), (["auto", "int4"], {None, 32})])
def test_caches_that_are_tried(kv_dtypes, groups) -> None:
    options = SimpleNamespace(kv_dtypes=kv_dtypes)
    caches = [QuestConfig.from_dict(one) for one in command.CACHES if command._is_asked_for(one, options)]
    assert {cache.kv_dtype for cache in caches} == set(kv_dtypes)
    assert {cache.value_group_size for cache in caches} == groups
    assert len(set(caches)) == len(caches)


@pytest.mark.parametrize("text", ["0", "-1%", "100%"])
def test_a_loss_is_a_percentage(text) -> None:
    with pytest.raises(SystemExit):
        command.main(["model", "--max-loss", text])
