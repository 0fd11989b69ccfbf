"""What the demo prints: two answers side by side, and what each backend's decoding cost."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass
from itertools import zip_longest
from statistics import median

import torch

from benchmarks.common.tables import table
from benchmarks.engine.run import EngineRun
from demo.documents import Question
from vllm_quest.config import QuestConfig
from vllm_quest.page import PageLayout

COLUMN = 52


@dataclass(frozen=True)
class Verdict:
    """A question and both answers."""

    name: str
    question: str
    dense: str
    quest: str
    dense_right: bool
    quest_right: bool
    identical: bool


@dataclass(frozen=True)
class Figure:
    """One row of the table.

    Attributes:
        label: What was measured.
        unit: Of both values; ``%`` for shares between 0 and 1.
        dense: None where not measured.
        quest: None where not measured.
        words: What it means that QUEST's value is higher, and that it is lower.
    """

    label: str
    unit: str
    dense: float | None
    quest: float | None
    words: tuple[str, str] = ("more", "less")


def judge(questions: tuple[Question, ...], dense: EngineRun, quest: EngineRun) -> list[Verdict]:
    """Whether each answer is right, and whether both are the same tokens."""
    return [
        Verdict(
            name=question.name,
            question=question.text,
            dense=one.text,
            quest=other.text,
            dense_right=question.is_right(one.text),
            quest_right=question.is_right(other.text),
            identical=one.token_ids == other.token_ids,
        )
        for question, one, other in zip(questions, dense.answers, quest.answers, strict=True)
    ]


def figures(dense: EngineRun, quest: EngineRun, config: QuestConfig) -> list[Figure]:
    """The table's rows; medians where there are repeats."""
    shares = read_shares(quest.counters)
    layout = PageLayout.configured(config, quest.block_size, quest.head_size, torch.float32, for_cpu=True)
    speeds = median(dense.tokens_per_s), median(quest.tokens_per_s)
    attention_ms = [median(run.attention_ms) if run.attention_ms else None for run in (dense, quest)]
    return [
        Figure("decode speed", "tokens/s", *speeds, words=("faster", "slower")),
        Figure("decode attention per step", "ms", attention_ms[0], attention_ms[1]),
        Figure("pages read, sparse layers", "%", 1.0, shares["pages"]),
        Figure("KV bytes read, sparse layers, bounds included", "%", 1.0, shares["bytes_sparse_layers"]),
        Figure("KV bytes read, all layers, bounds included", "%", 1.0, shares["bytes_all_layers"]),
        Figure("KV memory per token", "bytes", dense.kv_bytes_per_token, quest.kv_bytes_per_token),
        Figure("page bounds, share of KV memory", "%", 0.0, layout.metadata_share),
    ]


def read_shares(counters: dict[str, int]) -> dict[str, float]:
    """What decode steps read, as shares of what dense attention would have read.

    Args:
        counters: Growth of `vllm_quest.read_counters` over decode steps whose contexts exceed the budget. A
            layer in `dense_layers` reads per row what dense attention would have read in a sparse layer.
    """
    sparse_rows = counters["decode_rows_sparse"]
    if not sparse_rows:
        return {"pages": 1.0, "bytes_sparse_layers": 1.0, "bytes_all_layers": 1.0}
    in_dense_layers = counters["decode_rows_dense_layer"] * counters["bytes_dense"] / sparse_rows
    total = counters["bytes_dense"] + in_dense_layers
    return {
        "pages": counters["pages_read"] / counters["pages_scored"],
        "bytes_sparse_layers": counters["bytes_read"] / counters["bytes_dense"],
        "bytes_all_layers": (counters["bytes_read"] + in_dense_layers) / total,
    }


def answers_text(verdicts: list[Verdict]) -> str:
    """Both answers to each question in two columns."""
    return "\n\n".join(_answer_text(verdict) for verdict in verdicts)


def _answer_text(verdict: Verdict) -> str:
    def column(name: str, is_right: bool, text: str) -> list[str]:
        judged = f"{name} ({'right' if is_right else 'WRONG'})"
        return [judged, *textwrap.wrap(" ".join(text.split()), COLUMN - 2)]

    left = column("dense", verdict.dense_right, verdict.dense)
    right = column("QUEST", verdict.quest_right, verdict.quest)
    same = "identical tokens" if verdict.identical else "tokens differ"
    lines = [f"{verdict.name}: {verdict.question}  [{same}]"]
    lines += [f"  {a:{COLUMN}}{b}".rstrip() for a, b in zip_longest(left, right, fillvalue="")]
    return "\n".join(lines)


def table_text(rows: list[Figure]) -> str:
    """The figures, each with how QUEST compares; what it loses is said as plainly as what it gains."""
    lines = []
    for row in rows:
        label = row.label if row.unit == "%" else f"{row.label}, {row.unit}"
        lines.append([label, _cell(row.dense, row.unit), _cell(row.quest, row.unit), _comparison(row)])
    return table(("", "dense", "QUEST", ""), lines)


def _cell(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    if unit == "%":
        return f"{100 * value:.1f} %"
    return f"{value:.0f}" if unit == "bytes" else f"{value:.1f}"


def _comparison(row: Figure) -> str:
    if not row.dense or not row.quest:
        return ""
    ratio = row.quest / row.dense
    higher, lower = row.words
    return f"{ratio:.2f}x {higher}" if ratio >= 1 else f"{1 / ratio:.2f}x {lower}"


def as_json(verdicts: list[Verdict], rows: list[Figure]) -> dict[str, list[dict]]:
    """The same for programs."""
    return {
        "questions": [asdict(verdict) for verdict in verdicts],
        "figures": [{key: value for key, value in asdict(row).items() if key != "words"} for row in rows],
    }
