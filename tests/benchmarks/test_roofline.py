"""The byte model against numbers worked out by hand."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from benchmarks.kernels.roofline import GEOMETRIES, Step, break_even, main

LLAMA = GEOMETRIES["llama-3.1-8b"]


def test_dense_bytes() -> None:
    dense = Step(LLAMA, batch=8, context=32768).dense()
    assert dense["kv"] == 8 * 8 * 32768 * 128 * 2 * 2 == 2**30
    assert dense["q and out"] == 2 * 8 * 32 * 128 * 2
    assert sum(dense.values()) == pytest.approx(dense["kv"], rel=0.001)


def test_quest_bytes() -> None:
    """Bounds of 16-token pages are a sixteenth of K and V, as is a budget of 2048 of 32768 tokens."""
    quest = Step(LLAMA, batch=8, context=32768).quest()
    assert quest["bounds"] == quest["kv"] == 2**26
    assert quest["scores"] == 2 * 8 * 8 * 2048 * 4
    assert sum(quest.values()) == pytest.approx(2**27, rel=0.02)


def test_the_limit_is_eightfold_where_the_targets_say_so() -> None:
    assert Step(LLAMA, batch=8, context=32768).speed_up() == pytest.approx(8, rel=0.02)
    assert Step(LLAMA, batch=8, context=131072).speed_up() == pytest.approx(12.8, rel=0.02)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("page_size", [8, 16, 32])
def test_break_even_lies_just_above_the_budget(name, page_size) -> None:
    """Where context - context / page_size = budget, but for the small arrays."""
    step = Step(GEOMETRIES[name], batch=8, context=1, page_size=page_size, block_size=32)
    context = break_even(step)
    # The bounds of a page are as large as K and V of one token.
    assert context == pytest.approx(2048 / (1 - 1 / page_size), rel=0.03)
    assert replace(step, context=context).speed_up() > 1
    assert replace(step, context=context - page_size).speed_up() <= 1


def test_within_the_budget_nothing_is_gained_or_lost() -> None:
    assert Step(LLAMA, batch=1, context=2048).speed_up() == 1


def test_no_context_beats_the_page_size() -> None:
    with pytest.raises(ValueError, match="target: 16"):
        break_even(Step(LLAMA, batch=1, context=1), target=16)


def test_command_line(tmp_path, monkeypatch, capsys) -> None:
    arguments = "--geometry llama-3.1-8b mha-7b --context 32768 --batch 8 --budget 2048 --page-size 16"
    path = tmp_path / "roofline.json"
    monkeypatch.setattr(sys, "argv", ["roofline", *arguments.split(), "--json", str(path)])
    main()
    assert "llama-3.1-8b" in capsys.readouterr().out
    rows = json.loads(path.read_text())["rows"]
    assert [row["geometry"] for row in rows] == ["llama-3.1-8b", "mha-7b"]
    assert rows[0]["speed_up"] == pytest.approx(8, rel=0.02)
