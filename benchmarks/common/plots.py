"""Pictures of results (extra ``plot``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

matplotlib.use("Agg")

COLOURS = {"store": "#9e9e9e", "score": "#d95f02", "select": "#7570b3", "attend": "#1b9e77"}


def plot_context_cost(rows: list[dict[str, Any]], path: Path) -> None:
    """Left: dense and QUEST by kind of page over the context. Right: the parts of QUEST's step."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    kinds = sorted({(row["page_size"], row["metadata_dtype"]) for row in rows})
    shown = (16, "auto") if (16, "auto") in kinds else kinds[0]
    mine = _of(rows, shown)
    contexts = [row["context"] for row in mine]
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
    ticks = contexts[::2]
    for axes in (left, right):
        axes.set_xlim(contexts[0], contexts[-1])
        axes.set_xticks(ticks, [_short(context) for context in ticks], minor=False)
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_throughput(rows: list[dict[str, Any]], path: Path) -> None:
    """Left: decode tokens/s over the context. Right: times dense, bars from lowest to highest pair."""
    cells = sorted((row for row in rows if row["kind"] == "cell"), key=lambda row: row["context"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for batch in sorted({cell["batch"] for cell in cells}):
        for contender in sorted({cell["contender"] for cell in cells}):
            mine = [cell for cell in cells if (cell["batch"], cell["contender"]) == (batch, contender)]
            if not mine:
                continue
            contexts = [cell["context"] for cell in mine]
            name = f"{contender}, batch {batch}"
            (line,) = left.plot(contexts, [c["measured"]["tokens_per_s"] for c in mine], "-o", label=name)
            dense = [c["baseline"]["tokens_per_s"] for c in mine]
            left.plot(
                contexts,
                dense,
                "--",
                color=line.get_color(),
                label=f"{mine[0]['baseline']['name']} beside it",
            )
            ratios = [cell["ratios"]["decode"] for cell in mine]
            middle = [ratio["median"] for ratio in ratios]
            spread = [[r["median"] - r["low"] for r in ratios], [r["high"] - r["median"] for r in ratios]]
            right.errorbar(contexts, middle, spread, fmt="-o", capsize=3, color=line.get_color(), label=name)
    right.axhline(1, color="k", linewidth=0.8)
    left.set(xlabel="context, tokens", ylabel="decode tokens/s", ylim=(0, None), title="Decoding")
    right.set(xlabel="context, tokens", ylabel="times dense", title="Against dense, paired")
    for axes in (left, right):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_kernels(series: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Left: against the fastest dense kernel, and the limit of the bytes. Right: share of the bandwidth."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, rows in series.items():
        contexts = [row["context"] for row in rows]
        (drawn,) = left.plot(contexts, [row["speed_up"] for row in rows], "-o", markersize=3, label=name)
        limits = [row["speed_up_limit"] for row in rows]
        left.plot(contexts, limits, ":", linewidth=1, color=drawn.get_color())
        right.plot(contexts, [100 * row["share_of_limit"] for row in rows], "-o", markersize=3, label=name)
    left.axhline(1, color="k", linewidth=0.8)
    left.set(xscale="log", ylim=(0, None), xlabel="context, tokens", ylabel="times the fastest dense kernel")
    left.set_title("One decode step; dotted: the limit of the bytes")
    right.set(xscale="log", ylim=(0, 100), xlabel="context, tokens", ylabel="% of the copy bandwidth")
    right.set_title("How near the limit")
    ticks = sorted({row["context"] for rows in series.values() for row in rows})
    for axes in (left, right):
        axes.set_xticks(ticks, [_short(context) for context in ticks], minor=False)
        axes.set_xticks([], minor=True)
        axes.legend(fontsize=8)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _short(tokens: int) -> str:
    """1024 as 1k, 1048576 as 1M."""
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if tokens >= size:
            return f"{tokens / size:g}{unit}"
    return str(tokens)


def _kind(kind: tuple[int, str]) -> str:
    page_size, metadata_dtype = kind
    return f"page {page_size}" + ("" if metadata_dtype == "auto" else f", {metadata_dtype} bounds")


def _of(rows: list[dict[str, Any]], kind: tuple[int, str]) -> list[dict[str, Any]]:
    mine = [row for row in rows if (row["page_size"], row["metadata_dtype"]) == kind]
    return sorted(mine, key=lambda row: row["context"])
