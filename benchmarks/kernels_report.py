"""What `benchmarks.kernels` says of its rows."""

from __future__ import annotations

from benchmarks.tables import table


def line(row: dict) -> str:
    """One configuration."""
    times = "".join(f"{kind} {time:.4f} ms  " for kind, time in row["milliseconds"].items())
    missing = "".join(f"  no {kind}: {reason}" for kind, reason in row["left_out"].items())
    return (
        f"{row['geometry']:19} batch {row['batch']:<3} context {row['context']:<8}"
        f"budget {row['token_budget']:<6} page {row['page_size']:<3}{row['kv_dtype']:<5}"
        f"bounds {row['metadata_dtype']:<5}"
        f"{times}{row['speed_up']:.2f}x  "
        f"{row['gb_per_s']:.0f} GB/s  {row['share_of_limit']:.0%} of the limit{missing}"
    )


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
        formats += "" if row["metadata_dtype"] == "auto" else f", {row['metadata_dtype']} bounds"
        name = (
            f"{row['geometry']}, batch {row['batch']}, budget {row['token_budget']}, page {row['page_size']}"
        )
        found.setdefault(name + formats, []).append(row)
    return found
