"""The load and its arithmetic; no server is started."""

from __future__ import annotations

import json

import pytest

from benchmarks.engine.contenders import dense, quest
from benchmarks.engine.serve import COUNTERS, FIGURES, report
from benchmarks.engine.serve_load import CHARS_PER_TOKEN, Load, sparse_rows, write_prompts
from vllm_quest.config import QuestConfig

LOAD = Load(12, 0.25, 1000, 8, rate=1.0, goodput=("ttft:1000",))


def prompts(path) -> list[str]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(line["output_tokens"] == LOAD.output_tokens for line in lines)
    return [line["prompt"] for line in lines]


def test_long_documents_stand_among_short_chats(tmp_path) -> None:
    path = tmp_path / "prompts.jsonl"
    write_prompts(path, LOAD, seed=1)
    sizes = [len(prompt) for prompt in prompts(path)]
    assert len(sizes) == 12
    assert sum(size > LOAD.long_tokens * CHARS_PER_TOKEN for size in sizes) == 3
    assert sum(size < 300 for size in sizes) == 9


def test_both_sides_get_the_same_and_every_round_something_else(tmp_path) -> None:
    """A block of the prefix cache starts at the beginning: distinct beginnings share none."""
    path = tmp_path / "prompts.jsonl"
    rounds = []
    for seed in (1, 1, 2):
        write_prompts(path, LOAD, seed)
        rounds.append(prompts(path))
    assert rounds[0] == rounds[1]
    beginnings = {prompt[:20] for prompt in rounds[0] + rounds[2]}
    assert len(beginnings) == 24


@pytest.mark.parametrize("min_context", [0, 98, 150])
def test_rows_beyond_the_budget(min_context) -> None:
    """Counted one by one: the first answer token is prefill's, row i sees prompt and i tokens."""
    lens = ([94, 10, 200], [6, 3, 2])
    contexts = [95, 96, 97, 98, 99, 11, 12, 201]
    expected = [context for context in contexts if context > 96 and context >= min_context]
    config = QuestConfig(token_budget=96, min_context=min_context)
    assert sparse_rows(*lens, config) == len(expected)


def test_without_a_budget_no_row_is_sparse() -> None:
    assert sparse_rows([1000], [10], QuestConfig(token_budget=None)) == 0


def test_the_report_divides_dense_by_quest_and_shows_the_counters() -> None:
    slow, fast = dict.fromkeys(FIGURES, 200.0), dict.fromkeys(FIGURES, 100.0)
    counters = dict.fromkeys(COUNTERS, 0.0) | {"sparse": 2800.0}
    row = {
        "rate": 0.5,
        "round": 0,
        "dense": slow | {"counters": dict.fromkeys(COUNTERS, 0.0)},
        "quest": fast | {"counters": counters, "sparse_rows_expected": 100},
    }
    text = report([row], [dense("CPU_ATTN"), quest({}, 1024)])
    assert "TPOT 2.00x (2.00-2.00)" in text
    counted = text.splitlines()[-1].split()
    assert counted[2] == "2,800"
    assert counted[-2:] == ["100", "28"]
