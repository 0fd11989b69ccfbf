"""Pictures of kernels' times (extra ``plot``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common.plots import label_contexts, two_panels

COLOURS = {"store": "#9e9e9e", "score": "#d95f02", "select": "#7570b3", "attend": "#1b9e77"}


def plot_context_cost(rows: list[dict[str, Any]], path: Path) -> None:
    """Left: dense and QUEST by kind of page over the context. Right: the parts of QUEST's step."""
    kinds = sorted({(row["page_size"], row["bounds_dtype"]) for row in rows})
    shown = (16, "auto") if (16, "auto") in kinds else kinds[0]
    mine = _of(rows, shown)
    contexts = [row["context"] for row in mine]
    with two_panels(path) as (left, right):
        left.plot(contexts, [row["dense_ms"] for row in mine], "k-o", markersize=3, label="dense (vLLM)")
        for kind in kinds:
            times = {row["context"]: row["quest_ms"] for row in _of(rows, kind)}
            left.plot([*times], [*times.values()], "-o", markersize=3, label=f"QUEST, {_kind(kind)}")
        limit = [row["quest_limit_ms"] for row in mine]
        left.plot(contexts, limit, "k:", linewidth=1, label=f"limit of {_kind(shown)}")
        left.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="ms per step and layer")
        left.set_title("One decode step")
        left.legend(fontsize=8)
        right.stackplot(
            contexts,
            *([row["parts_ms"][part] / sum(row["parts_ms"].values()) for row in mine] for part in COLOURS),
            labels=list(COLOURS),
            colors=list(COLOURS.values()),
        )
        right.set(xscale="log", ylim=(0, 1), xlabel="context, tokens", ylabel="share of QUEST's step")
        right.set_title(f"Where the time goes, {_kind(shown)}")
        right.legend(fontsize=8, loc="lower left")
        for axes in (left, right):
            axes.set_xlim(contexts[0], contexts[-1])
            label_contexts(axes, contexts[::2])


def plot_kernels(series: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Left: against the fastest dense kernel, and the limit of the bytes. Right: share of the bandwidth."""
    with two_panels(path) as (left, right):
        for name, rows in series.items():
            contexts = [row["context"] for row in rows]
            (drawn,) = left.plot(contexts, [row["speed_up"] for row in rows], "-o", markersize=3, label=name)
            limits = [row["speed_up_limit"] for row in rows]
            left.plot(contexts, limits, ":", linewidth=1, color=drawn.get_color())
            right.plot(
                contexts, [100 * row["share_of_limit"] for row in rows], "-o", markersize=3, label=name
            )
        left.axhline(1, color="k", linewidth=0.8)
        left.set(
            xscale="log", ylim=(0, None), xlabel="context, tokens", ylabel="times the fastest dense kernel"
        )
        left.set_title("One decode step; dotted: the limit of the bytes")
        right.set(xscale="log", ylim=(0, 100), xlabel="context, tokens", ylabel="% of the copy bandwidth")
        right.set_title("How near the limit")
        ticks = sorted({row["context"] for rows in series.values() for row in rows})
        for axes in (left, right):
            label_contexts(axes, ticks)
            axes.legend(fontsize=8)


def _kind(kind: tuple[int, str]) -> str:
    page_size, bounds_dtype = kind
    return f"page {page_size}" + ("" if bounds_dtype == "auto" else f", {bounds_dtype} bounds")


def _of(rows: list[dict[str, Any]], kind: tuple[int, str]) -> list[dict[str, Any]]:
    mine = [row for row in rows if (row["page_size"], row["bounds_dtype"]) == kind]
    return sorted(mine, key=lambda row: row["context"])
