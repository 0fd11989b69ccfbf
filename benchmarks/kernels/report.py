"""What `benchmarks.kernels.gpu` says of its rows."""

from __future__ import annotations

import math

from benchmarks.common.tables import table
from benchmarks.kernels.peers import PEERS

QUEST = ("QUEST", "QUEST dense")


def ratios(milliseconds: dict[str, float]) -> dict:
    """How many times as fast QUEST is.

    Returns:
        ``speed_up`` over the fastest dense kernel in the model's dtype, and ``dense_speed_up``, that of QUEST
        without a budget over each of vLLM's 4-bit caches. NaN where a time is missing.
    """
    in_model_dtype = [time for kind, time in milliseconds.items() if kind not in (*QUEST, *PEERS)]
    fastest = min(in_model_dtype, default=math.nan)
    dense = milliseconds.get("QUEST dense", math.nan)
    return {
        "speed_up": fastest / milliseconds.get("QUEST", math.nan),
        "dense_speed_up": {kind: milliseconds[kind] / dense for kind in PEERS if kind in milliseconds},
    }


def line(row: dict) -> str:
    """One configuration; a second line for QUEST's launches alone, if they were timed."""
    times = "".join(f"{kind} {_us(time)}  " for kind, time in row["milliseconds"].items())
    missing = "".join(f"  no {kind}: {reason}" for kind, reason in row["left_out"].items())
    text = (
        f"{row['geometry']:19} batch {row['batch']:<3} context {row['context']:<8}"
        f"budget {row['token_budget']:<6} page {row['page_size']:<3}{row['kv_dtype']:<5}"
        f"bounds {row['bounds_dtype']:<5}"
        f"{times}us  {row['speed_up']:.2f}x  "
        f"{row['gb_per_s']:.0f} GB/s  {row['share_of_limit']:.0%} of the limit{missing}"
    )
    if "operations" in row:
        alone = "  ".join(f"{name} {_us(time)}" for name, time in row["operations"].items())
        text += f"\n    alone: {alone} us"
    return text


def microseconds(rows: list[dict]) -> str:
    """A table of all times, named by what differs, and of both ratios: the second for 4-bit pages."""
    measured = {kind for row in rows for kind in row["milliseconds"]}
    kinds = [*QUEST, *sorted(measured - {*QUEST, *PEERS}), *(kind for kind in PEERS if kind in measured)]
    settings = ("geometry", "token_budget", "page_size", "kv_dtype", "bounds_dtype")
    differing = [key for key in settings if len({row[key] for row in rows}) > 1]
    lines = []
    for row in rows:
        name = ", ".join(str(row[key]) for key in ("batch", "context", *differing))
        times = [_us(row["milliseconds"][kind]) if kind in row["milliseconds"] else "-" for kind in kinds]
        peers = row["dense_speed_up"].values() if row["kv_dtype"] == "int4" else ()
        lines.append([name, *times, f"{row['speed_up']:.2f}x", " ".join(f"{ratio:.2f}x" for ratio in peers)])
    columns = (", ".join(("batch", "context", *differing)), *kinds, "speed-up", "dense over 4-bit")
    return f"Microseconds per layer\n{table(columns, lines)}"


def _us(milliseconds: float) -> str:
    return f"{1e3 * milliseconds:.1f}"


def break_even(rows: list[dict]) -> int | None:
    """The shortest measured context from which on QUEST is faster at every measured one."""
    found = None
    for row in sorted(rows, key=lambda row: row["context"], reverse=True):
        if not row["speed_up"] > 1:  # NaN, where nothing dense ran, is no win
            break
        found = row["context"]
    return found


def summary(rows: list[dict]) -> str:
    """Break-even and the ends of each series of contexts, then the row where QUEST does worst."""
    lines = []
    for kind, mine in series(rows).items():
        found = break_even(mine)
        ends = [f"{row['speed_up']:.2f}x at {row['context']:,}" for row in (mine[0], mine[-1])]
        lines.append([kind, f"{found:,}" if found else "nowhere measured", *ends])
    worst = min(rows, key=lambda row: row["speed_up"])
    columns = ("series", "breaks even at", "shortest context", "longest context")
    return f"{table(columns, lines)}\n\nworst: {line(worst)}"


def series(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows that differ in their context only, by a name, in ascending order."""
    found: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["context"]):
        formats = "" if row["kv_dtype"] == "auto" else f", {row['kv_dtype']}"
        formats += "" if row["bounds_dtype"] == "auto" else f", {row['bounds_dtype']} bounds"
        name = (
            f"{row['geometry']}, batch {row['batch']}, budget {row['token_budget']}, page {row['page_size']}"
        )
        found.setdefault(name + formats, []).append(row)
    return found
