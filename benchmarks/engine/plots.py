"""Pictures of the engine's speed (extra ``plot``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common.plots import two_panels


def plot_throughput(rows: list[dict[str, Any]], path: Path) -> None:
    """Left: decode tokens/s over the context. Right: times dense, bars from lowest to highest pair."""
    cells = sorted((row for row in rows if row["kind"] == "cell"), key=lambda row: row["context"])
    with two_panels(path) as (left, right):
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
                    label=f"{mine[0]['baseline']['name']} next to it",
                )
                ratios = [cell["ratios"]["decode"] for cell in mine]
                middle = [ratio["median"] for ratio in ratios]
                spread = [[r["median"] - r["low"] for r in ratios], [r["high"] - r["median"] for r in ratios]]
                right.errorbar(
                    contexts, middle, spread, fmt="-o", capsize=3, color=line.get_color(), label=name
                )
        right.axhline(1, color="k", linewidth=0.8)
        left.set(xlabel="context, tokens", ylabel="decode tokens/s", ylim=(0, None), title="Decoding")
        right.set(xlabel="context, tokens", ylabel="times dense", title="Against dense, paired")
        for axes in (left, right):
            axes.legend(fontsize=8)
