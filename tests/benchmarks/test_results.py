"""Results that a benchmark can go on from."""

from __future__ import annotations

import json

import pytest

from benchmarks.common.results import ResultsError, ResultsFile

ABOUT = {"command": "first", "date": "2026-01-01", "device": "CPU", "repeats": 5}
KEYS = ("contender", "context")


def test_rows_survive_the_run(tmp_path) -> None:
    path = tmp_path / "results" / "rows.json"
    ResultsFile(path, ABOUT, KEYS).add({"contender": "QUEST", "context": 1, "probes": {128: 1.5}})
    again = ResultsFile(path, ABOUT | {"command": "second", "date": "2026-01-02"}, KEYS)
    assert again.find(contender="QUEST", context=1) == {
        "contender": "QUEST",
        "context": 1,
        "probes": {"128": 1.5},
    }
    assert again.find(contender="QUEST", context=2) is None
    again.add({"contender": "QUEST", "context": 2})
    written = json.loads(path.read_text())
    assert written["about"]["command"] == "second"
    assert [row["context"] for row in written["rows"]] == [1, 2]


@pytest.mark.parametrize("change", [{"device": "another"}, {"repeats": 6}, {"budget": 1024}])
def test_other_settings_are_not_mixed(tmp_path, change) -> None:
    path = tmp_path / "rows.json"
    ResultsFile(path, ABOUT, KEYS).add({"contender": "QUEST", "context": 1})
    with pytest.raises(ResultsError, match=next(iter(change))):
        ResultsFile(path, ABOUT | change, KEYS)


def test_a_row_has_its_key() -> None:
    with pytest.raises(ValueError, match="context"):
        ResultsFile(None, ABOUT, KEYS).add({"contender": "QUEST"})


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    results = ResultsFile(None, ABOUT, KEYS)
    results.add({"contender": "QUEST", "context": 1})
    assert results.find(contender="QUEST", context=1)
    assert not list(tmp_path.iterdir())
