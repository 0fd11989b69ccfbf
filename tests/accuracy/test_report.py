"""Statistics, judgements and tables of the accuracy report, on scores whose right figures are known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy.cells import DENSE, Evaluation, evaluate
from benchmarks.accuracy.plots import _front
from benchmarks.accuracy.report import write_report
from benchmarks.accuracy.samples import Header, Results, Score
from benchmarks.accuracy.statistics import bootstrap, wilson

SAMPLES = 40
# 1 dense and 3 sparse layers, 10 rows: sparse layers read a quarter.
COUNTERS = {
    "decode_rows_sparse": 30,
    "decode_rows_dense_layer": 10,
    "pages_scored": 400,
    "pages_read": 100,
    "bytes_read": 750,
    "bytes_dense": 3_000,
}


def test_wilson_gives_the_published_intervals() -> None:
    # Newcombe (1998), table I, method 3: 81 of 263, 15 of 148, 0 of 20 and 1 of 29.
    for hits, count, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(hits, count) == pytest.approx((hits / count, low, high), abs=5e-5)


def test_the_bootstrap_covers_the_mean_of_normal_samples_as_often_as_it_says() -> None:
    import numpy as np

    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        interval = bootstrap([generator.normal(1, 2, 50), generator.normal(3, 1, 80)])
        covered += interval.low <= 2 <= interval.high
    assert 0.90 <= covered / 200 <= 0.98


def test_a_constant_difference_has_no_spread() -> None:
    assert bootstrap([[0.5] * 9, [1.5] * 4]) == (1.0, 1.0, 1.0)


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """Dense and one configuration on five tasks: what dense makes of them is in their names."""
    results = Results(tmp_path / "model-4096.jsonl")
    results.append(_header(DENSE, None, 1_000))
    results.append(_header("narrow", {"page_size": 16, "token_budget": 512}, 1_100))
    for index in range(SAMPLES):
        results.append(_score(DENSE, "does_exactly", index, exact=index < 30, rank=1))
        results.append(_score("narrow", "does_exactly", index, exact=index < 20, rank=1))
        results.append(_score(DENSE, "ranks", index, exact=index < 20, rank=1 if index < 32 else 2))
        results.append(_score("narrow", "ranks", index, exact=index < 20, rank=1 if index < 16 else 2))
        results.append(_score(DENSE, "cannot", index, exact=False, rank=1 if index < 20 else 2))
        results.append(_score("narrow", "cannot", index, exact=True, rank=1))
        results.append(_score(DENSE, "prose", index, nll=2.0))
        results.append(_score("narrow", "prose", index, nll=2.5, kl=0.5))
    results.append(_score("narrow", "sparse_only", 0, exact=True, rank=1))
    return results


def _header(name: str, quest: dict[str, Any] | None, kv_bytes_per_token: float) -> Header:
    return Header(
        configuration=name,
        quest=quest,
        kv_bytes_per_token=kv_bytes_per_token,
        block_size=128,
        model="model",
        context=4096,
        seconds_per_token=0.05,
        versions={"vLLM": "1"},
        machine={"cores": "2"},
        command="measure",
        date="2026-01-01",
    )


def _score(name: str, task: str, index: int, **values: Any) -> Score:
    defaults = {"context_tokens": 3968, "tokens": 5, "nll": 1.0, "exact": False, "agreement": 1.0, "kl": 0.0}
    counters = {} if name == DENSE else COUNTERS
    return Score(name, task, index, **(defaults | values), counters=counters)


@pytest.fixture
def evaluation(results: Results) -> Evaluation:
    return evaluate(results)


def test_tasks_are_judged_by_what_dense_makes_of_them(evaluation: Evaluation) -> None:
    assert evaluation.judged == {
        "does_exactly": "exact",
        "ranks": "rank",
        "cannot": None,  # half is not more than half
        "prose": "nll",
        "sparse_only": None,
    }


def test_what_dense_cannot_do_is_in_no_average(evaluation: Evaluation) -> None:
    dense, narrow = evaluation.summaries[DENSE], evaluation.summaries["narrow"]
    assert dense.right == pytest.approx((30 / 40 + 32 / 40) / 2)
    assert narrow.right == pytest.approx((20 / 40 + 16 / 40) / 2)
    assert narrow.right_change is not None
    assert narrow.right_change.value == pytest.approx(-(10 / 40 + 16 / 40) / 2)
    assert narrow.right_change.is_below
    assert narrow.nll_change is not None
    assert narrow.nll_change.value == pytest.approx(0.5 / 3)  # prose among three tasks
    assert narrow.kl == pytest.approx(0.5 / 3)


def test_bytes_come_from_the_counters_with_dense_layers_read_in_full(evaluation: Evaluation) -> None:
    dense, narrow = evaluation.summaries[DENSE], evaluation.summaries["narrow"]
    assert dense.kv_bytes_read == 3968 * 1_000
    assert narrow.kv_bytes_read == pytest.approx(3968 * 1_000 * (3 * 0.25 + 1) / 4)


def test_dense_rows_of_a_4_bit_cache_read_what_it_stores(tmp_path: Path) -> None:
    results = Results(tmp_path / "model-4096.jsonl")
    results.append(_header(DENSE, None, 1_000))
    results.append(_header("all", {"page_size": 16, "kv_dtype": "int4"}, 300))
    results.append(_score(DENSE, "needle", 0, exact=True, rank=1))
    all_dense = {"decode_rows_sparse": 0, "decode_rows_dense_budget": 40, "bytes_read": 0, "bytes_dense": 0}
    results.append(replace(_score("all", "needle", 0, exact=True, rank=1), counters=all_dense))
    assert evaluate(results).summaries["all"].kv_bytes_read == 3968 * 300


def test_changes_are_paired_by_sample(evaluation: Evaluation) -> None:
    cell = evaluation.cells["narrow", "prose"]
    assert cell.nll_change == (0.5, 0.5, 0.5)  # every sample loses exactly that
    assert evaluation.cells["narrow", "sparse_only"].exact_change is None


def test_the_report_says_what_was_lost_and_what_was_not_measured(results: Results) -> None:
    text = write_report(results.path.parent)
    (summary,) = [line for line in text.splitlines() if line.startswith("| narrow | 1.7 MiB")]
    assert "43.8 %" in summary
    assert "**-32.5**" in summary
    assert "| cannot | 40 | 0 % [0, 9] | 50 % [35, 65] |" in text
    assert "beyond the dense model" in text
    assert "| sparse_only | 0 | not measured" in text
    assert "**50 % [35, 65]**" in text  # does_exactly: 75 % under dense
    written = json.loads((results.path.parent / "report.json").read_text())
    assert written[0]["configurations"]["narrow"]["right"] == pytest.approx(0.45)


def test_pictures_are_drawn(results: Results) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra 'plot'")
    write_report(results.path.parent)
    pictures = sorted(results.path.parent.glob("*.png"))
    assert [path.stem for path in pictures] == [
        f"model-4096-{what}" for what in ("quality-over-bytes", "quality-over-memory", "tasks")
    ]
    assert all(path.stat().st_size > 10_000 for path in pictures)


def test_results_without_dense_still_give_tables(tmp_path: Path) -> None:
    results = Results(tmp_path / "model-4096.jsonl")
    results.append(_header("narrow", {"page_size": 16}, 1_100))
    results.append(_score("narrow", "needle", 0, exact=True, rank=1))
    text = write_report(tmp_path)
    assert "| narrow | not measured | not measured |" in text


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no results"):
        write_report(tmp_path)


def test_the_front_holds_what_nothing_cheaper_equals() -> None:
    points = [(10.0, 1.0, "a"), (20.0, 1.0, "b"), (20.0, 3.0, "c"), (30.0, 2.0, "d"), (40.0, 4.0, "e")]
    assert [name for *_, name in _front(points, better=1)] == ["a", "c", "e"]
    assert [name for *_, name in _front(points, better=-1)] == ["a"]
