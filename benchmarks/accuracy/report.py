"""Tables and plots of measured accuracy, with what each configuration costs and saves.

    python -m benchmarks.accuracy report FOLDER

reads every ``*.jsonl`` of the grid in FOLDER and writes ``report.md``, ``report.json`` and the plots next
to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.accuracy.cells import DENSE, Cell, Evaluation, Summary, evaluate
from benchmarks.accuracy.plots import write_plots
from benchmarks.accuracy.samples import Results
from benchmarks.accuracy.statistics import Interval
from benchmarks.common.results import write_json
from benchmarks.common.tables import markdown

__all__ = ["write_report"]

NOT_MEASURED = "not measured"
JUDGED = {
    "exact": "exact answers",
    "rank": "right answer ranked first",
    "nll": "log-likelihood",
    None: "beyond the dense model: in no average",
}


def write_report(folder: Path) -> str:
    """Writes everything; returns the text of ``report.md`` and the names of the pictures.

    Raises:
        ValueError: No results in `folder`.
    """
    measured = [results for results in Results.in_folder(folder) if results.headers]
    if not measured:
        raise ValueError(f"{folder}: no results (*.jsonl) of python -m benchmarks.accuracy")
    evaluations = [evaluate(results) for results in measured]
    text = "\n".join(line for one in evaluations for line in _report(one))
    (folder / "report.md").write_text(text)
    write_json(folder / "report.json", [_as_json(one) for one in evaluations])
    try:
        pictures = [path for one in evaluations for path in write_plots(one, folder)]
    except ModuleNotFoundError as error:
        return f"{text}\nNo pictures: {error}"
    return "\n".join([text, *map(str, pictures)])


def _report(one: Evaluation) -> Iterator[str]:
    header = next(iter(one.summaries.values())).header
    yield f"# {one.model}, context {one.context} tokens\n"
    yield ", ".join(f"{name} {value}" for name, value in (header.versions | header.machine).items())
    yield f"\n`{header.command}`, {header.date}\n"
    yield "## Configurations\n"
    yield "Changes are to dense, paired by sample; 95 % intervals. **Bold**: the whole interval is worse.\n"
    yield markdown(
        ("configuration", "KV read per token", "of dense", "KV memory per token", "ms per token",
         "right answers", "change, points", "NLL change", "KL to dense"),
        (_summary_row(name, summary, one) for name, summary in one.summaries.items()),
    ) + "\n"  # fmt: skip
    yield "## Tasks under dense attention\n"
    yield (
        markdown(
            ("task", "samples", "exact", "ranked first", "NLL", "ROUGE-L", "judged by"),
            (_dense_row(task, one.cells.get((DENSE, task)), how) for task, how in one.judged.items()),
        )
        + "\n"
    )
    yield "## Every task, every configuration\n"
    yield "Share of right answers as the task is judged; where by log-likelihood, the change of NLL, nat.\n"
    tasks = [task for task, how in one.judged.items() if how]
    yield (
        markdown(
            ("configuration", *tasks),
            ((name, *(_task_cell(one, name, task) for task in tasks)) for name in one.summaries),
        )
        + "\n"
    )


def _summary_row(name: str, summary: Summary, one: Evaluation) -> tuple[str, ...]:
    header = summary.header
    dense = one.summaries.get(DENSE)
    read, full = summary.kv_bytes_read, dense and dense.kv_bytes_read
    memory = header.kv_bytes_per_token
    memory_text = f"{memory / 1024:.1f} KiB"
    if dense and summary is not dense:
        memory_text += f" ({memory / dense.header.kv_bytes_per_token:.2f}x)"
    return (
        name,
        NOT_MEASURED if read is None else f"{read / 2**20:.1f} MiB",
        f"{100 * read / full:.1f} %" if read is not None and full else NOT_MEASURED,
        memory_text,
        f"{1000 * header.seconds_per_token:.1f}" if header.seconds_per_token else NOT_MEASURED,
        NOT_MEASURED if summary.right is None else f"{100 * summary.right:.1f} %",
        "-" if summary is dense else _change(summary.right_change, 100, "+.1f", higher_is_worse=False),
        "-" if summary is dense else _change(summary.nll_change, 1, "+.3f", higher_is_worse=True),
        "-" if summary is dense else (NOT_MEASURED if summary.kl is None else f"{summary.kl:.4f}"),
    )


def _dense_row(task: str, cell: Cell | None, how: str | None) -> tuple[str, ...]:
    if cell is None:
        return (task, "0", *[NOT_MEASURED] * 4, NOT_MEASURED)
    return (
        task,
        str(cell.samples),
        _share(cell.exact),
        _share(cell.first) if cell.first else "-",
        cell.nll.text(".3f"),
        f"{cell.rouge.value:.3f}" if cell.rouge else "-",
        JUDGED[how],
    )


def _task_cell(one: Evaluation, name: str, task: str) -> str:
    cell = one.cells.get((name, task))
    if cell is None:
        return NOT_MEASURED
    right = cell.right(one.judged[task])
    if right is not None:
        change = cell.exact_change if one.judged[task] == "exact" else cell.first_change
        text = _share(right)
        return f"**{text}**" if change and change.is_below else text
    if name == DENSE:
        return "-"
    text = _change(cell.nll_change, 1, "+.3f", higher_is_worse=True)
    return f"{text}, ROUGE-L {cell.rouge.value:.3f}" if cell.rouge else text


def _share(share: Interval) -> str:
    return f"{100 * share.value:.0f} % [{100 * share.low:.0f}, {100 * share.high:.0f}]"


def _change(change: Interval | None, scale: float, form: str, *, higher_is_worse: bool) -> str:
    if change is None:
        return NOT_MEASURED
    is_worse = change.is_above if higher_is_worse else change.is_below
    return change.text(form, scale, mark="**" if is_worse else "")


def _as_json(one: Evaluation) -> dict[str, Any]:
    """Shares between 0 and 1, bytes, nat, seconds; None where not measured."""
    return {
        "model": one.model,
        "context": one.context,
        "judged": one.judged,
        "configurations": {name: asdict(summary) for name, summary in one.summaries.items()},
        "cells": [
            {"configuration": name, "task": task, **asdict(cell)} for (name, task), cell in one.cells.items()
        ],
    }
