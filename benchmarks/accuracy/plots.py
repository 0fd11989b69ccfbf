"""What a configuration keeps, over what it costs: pictures that say it at a glance.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; page sizes also have
their own markers.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.accuracy.cells import DENSE, Evaluation, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["write_plots"]

STYLES = {
    8: ("#0072B2", "o"),
    16: ("#D55E00", "s"),
    32: ("#009E73", "^"),
    64: ("#CC79A7", "D"),
}  # by page size
GREY = "#666666"
CONTROL = "control"  # how the names of scorers begin that are broken on purpose
COLUMNS = 3

Cost = Callable[[Summary], float | None]


def write_plots(one: Evaluation, folder: Path) -> list[Path]:
    """Three pictures: quality over bytes read, quality over memory, every task over bytes read.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; says how to.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'vllm-quest[plot]'") from error
    matplotlib.use("Agg")
    if DENSE not in one.summaries:
        return []
    read = "KV bytes read per decoded token, % of dense (log scale)"
    memory = "KV memory per token of context, % of dense"
    full = one.summaries[DENSE]
    stem = f"{one.model}-{one.context}"

    def share_read(summary: Summary) -> float | None:
        return (
            summary.kv_bytes_read and full.kv_bytes_read and 100 * summary.kv_bytes_read / full.kv_bytes_read
        )

    def share_memory(summary: Summary) -> float:
        return 100 * summary.header.kv_bytes_per_token / full.header.kv_bytes_per_token

    return [
        _pareto(one, share_read, read, folder / f"{stem}-quality-over-bytes.png"),
        _pareto(one, share_memory, memory, folder / f"{stem}-quality-over-memory.png"),
        _tasks(one, share_read, read, folder / f"{stem}-tasks.png"),
    ]


def _pareto(one: Evaluation, cost: Cost, label: str, path: Path) -> Path:
    """Right answers above, change of log-likelihood below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    judged = [task for task, how in one.judged.items() if how in ("exact", "rank")]
    figure.suptitle(f"{one.model}, {one.context} tokens of context")
    _points(above, one, cost, lambda summary: summary.right and 100 * summary.right, better=1)
    above.set_ylabel(f"right answers, %\n(mean of {len(judged)} tasks)")
    _points(below, one, cost, lambda summary: summary.nll_change and summary.nll_change.value, better=-1)
    below.set_ylabel("NLL above dense, nat per token\n(lower is better)")
    below.set_xlabel(label)
    if "log" in label:
        _log_percent(below)
    _legend(above, one)
    figure.savefig(path, dpi=120)
    return path


def _points(
    axes: Axes, one: Evaluation, cost: Cost, quality: Callable[[Summary], float | None], better: int
) -> None:
    """Every configuration; those that no cheaper one equals in quality are joined, numbered and listed.

    Never the controls, which are measured on other tasks than the rest.
    """
    dense = one.summaries[DENSE]
    reference = quality(dense) if better > 0 else 0.0
    if reference is not None:
        axes.axhline(reference, color="black", linestyle="--", linewidth=1)
        axes.plot(100, reference, "*", color="black", markersize=13)
        axes.annotate("dense", (0.01, reference), xycoords=("axes fraction", "data"), va="bottom")
    points = [
        (x, y, name)
        for name, summary in one.summaries.items()
        if summary is not dense and (x := cost(summary)) is not None and (y := quality(summary)) is not None
    ]
    for x, y, name in points:
        axes.plot(x, y, markersize=8, linestyle="none", **_style(one.summaries[name]))
    points = [point for point in points if not point[2].startswith(CONTROL)]
    front = _front(points if reference is None else [*points, (100, reference, DENSE)], better)
    axes.plot([x for x, _, _ in front], [y for _, y, _ in front], color=GREY, linewidth=1, zorder=0)
    for number, (x, y, _) in enumerate(front, start=1):
        axes.annotate(str(number), (x, y), textcoords="offset points", xytext=(5, 5), fontsize=9)
    listed = "\n".join(_listed(number, name) for number, (_, _, name) in enumerate(front, start=1))
    axes.annotate(listed, (1.02, 1), xycoords="axes fraction", va="top", fontsize=8.5, linespacing=1.4)
    axes.grid(alpha=0.3)


def _listed(number: int, name: str) -> str:
    """A configuration of the front, its name in lines that fit next to the picture."""
    return textwrap.fill(
        f"{number}  {name.replace('token_budget=', 'budget ')}", width=30, subsequent_indent="    "
    )


def _front(points: list[tuple[float, float, str]], better: int) -> list[tuple[float, float, str]]:
    """The points that no cheaper point equals in quality, cheapest first."""
    front: list[tuple[float, float, str]] = []
    for point in sorted(points, key=lambda point: (point[0], -better * point[1])):
        if not front or better * point[1] > better * front[-1][1]:
            front.append(point)
    return front


def _tasks(one: Evaluation, cost: Cost, label: str, path: Path) -> Path:
    """One panel for every task that the dense model can do, with 95 % intervals."""
    from matplotlib.figure import Figure

    tasks = [task for task, how in one.judged.items() if how]
    rows = max(1, -(-len(tasks) // COLUMNS))
    figure = Figure(figsize=(12, 3.2 * rows), layout="constrained")
    panels = list(figure.subplots(rows, COLUMNS, sharex=True, squeeze=False).flat)
    figure.suptitle(f"{one.model}, {one.context} tokens of context: every task (dashed: dense)")
    for axes, task in zip(panels, tasks, strict=False):
        _task_panel(axes, one, task, cost)
    for axes in panels[len(tasks) :]:
        axes.set_axis_off()
    if "log" in label:
        _log_percent(figure.axes[0])
    figure.supxlabel(label)
    _legend(figure.axes[0], one)
    figure.savefig(path, dpi=120)
    return path


def _task_panel(axes: Axes, one: Evaluation, task: str, cost: Cost) -> None:
    how = one.judged[task]
    for name, summary in one.summaries.items():
        cell, x = one.cells.get((name, task)), cost(summary)
        if cell is None or x is None:
            continue
        right = cell.right(how)
        scale, shown = (100, right) if right else (1, cell.nll)
        value, low, high = (scale * end for end in shown)
        if name == DENSE:
            axes.axhline(value, color="black", linestyle="--", linewidth=1)
            axes.axhspan(low, high, color="black", alpha=0.06)
            continue
        error = [[value - low], [high - value]]
        axes.errorbar(x, value, error, markersize=6, linewidth=1, linestyle="none", **_style(summary))
    unit = {"exact": "exact answers, %", "rank": "ranked first, %", "nll": "NLL, nat (lower is better)"}
    axes.set_title(task.replace("_", " "), fontsize=10)
    axes.set_ylabel(unit[str(how)], fontsize=8)
    axes.grid(alpha=0.3)


def _style(summary: Summary) -> dict[str, Any]:
    """Colour and form say the page size; hollow marks are quantized caches, crosses controls."""
    if summary.header.configuration.startswith(CONTROL):
        return {"color": GREY, "marker": "x"}
    quest: dict[str, Any] = summary.header.quest or {}
    colour, marker = STYLES.get(quest.get("page_size", 0), (GREY, "X"))
    face = colour if quest.get("kv_dtype", "auto") == "auto" else "white"
    return {"color": colour, "marker": marker, "markerfacecolor": face}


def _legend(axes: Axes, one: Evaluation) -> None:
    shown: dict[str, dict[str, Any]] = {}
    for summary in one.summaries.values():
        if summary.header.configuration.startswith(CONTROL):
            shown["broken on purpose"] = _style(summary)
        elif summary.header.quest:
            kv_dtype = summary.header.quest.get("kv_dtype", "auto")
            stored = "" if kv_dtype == "auto" else f", {kv_dtype}"
            shown[f"pages of {summary.header.quest['page_size']} tokens{stored}"] = _style(summary)
    for label in sorted(shown, key=lambda label: (len(label), label)):
        axes.plot([], [], linestyle="none", label=label, **shown[label])
    if shown:
        axes.legend(fontsize=8, loc="best")


def _log_percent(axes: Axes) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([5, 10, 15, 20, 30, 40, 50, 70, 100]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
