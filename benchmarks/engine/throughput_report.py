"""The tables of `benchmarks.engine.throughput`."""

from __future__ import annotations

from typing import Any

from benchmarks.common.pairs import Ratio
from benchmarks.common.tables import table

Rows = list[dict[str, Any]]


def report(rows: Rows) -> str:
    """Everything measured, one table per question."""
    cells = [row for row in rows if row["kind"] == "cell"]
    cells.sort(key=lambda row: (row["batch"], row["context"]))
    parts = [decode_table(cells), prefill_table(cells), memory_table(cells)] if cells else []
    parts += [_break_even_line(row) for row in rows if row["kind"] == "break-even"]
    parts += [
        f"{row['contender']}: not measured: {row['reason']}" for row in rows if row["kind"] == "skipped"
    ]
    return "\n" + "\n\n".join(parts)


def decode_table(cells: Rows) -> str:
    """Decode speed; the limit counts weights and KV at the bandwidth that the same run measured."""
    columns = ["decode", "batch", "context", "tokens/s", "against dense", "p50 ms", "p99 ms", "of limit"]
    columns += ["attention ms", "against dense", "of limit"]
    rows = []
    for cell, side, ratios in _sides(cells):
        row = [side["name"], str(cell["batch"]), f"{cell['context']:,}", f"{side['tokens_per_s']:.2f}"]
        row += [ratios.get("decode", ""), f"{side['tpot_p50_ms']:.1f}", f"{side['tpot_p99_ms']:.1f}"]
        row += [_share(side["share_of_limit"])]
        if "attention_ms" in side:
            row += [f"{side['attention_ms']:.2f}", ratios.get("attention", "")]
            row += [_share(side["attention_share_of_limit"])]
        else:
            row += ["not measured", "", ""]
        rows.append(row)
    return table(columns, rows)


def prefill_table(cells: Rows) -> str:
    """Prefill speed, one prompt at a time."""
    rows = [
        [
            side["name"],
            f"{cell['context']:,}",
            f"{side['prefill_tokens_per_s']:.1f}",
            ratios.get("prefill", ""),
            str(len(side["samples"]["prefill_s"])),
        ]
        for cell, side, ratios in _sides(cells)
    ]
    return table(("prefill", "context", "tokens/s", "against dense", "prompts"), rows)


def memory_table(cells: Rows) -> str:
    """What fits into the same KV memory, by vLLM's own account."""
    columns = (
        "memory",
        "context",
        "KV tokens that fit",
        "requests at once",
        "KV bytes per token",
        "peak MiB",
    )
    rows: dict[tuple[str, int], list[str]] = {}
    for cell, side, _ in _sides(cells):
        rows[side["name"], cell["context"]] = [
            side["name"],
            f"{cell['context']:,}",
            f"{side['kv_tokens']:,}",
            str(side["requests_at_once"]),
            f"{side['kv_bytes_per_token']:,.0f}",
            f"{side['peak_memory_bytes'] >> 20:,}",
        ]
    return table(columns, list(rows.values()))


def _sides(cells: Rows) -> list[tuple[dict, dict, dict[str, str]]]:
    """Every row of a table: its cell, one side of it, and its ratios, of which the baseline has none."""
    rows: list[tuple[dict, dict, dict[str, str]]] = []
    for cell in cells:
        ratios = {name: str(Ratio(**ratio)) for name, ratio in cell["ratios"].items()}
        rows += [(cell, cell["baseline"], {}), (cell, cell["measured"], ratios)]
    return rows


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"


def _break_even_line(row: dict) -> str:
    probes = sorted((int(context), ratio) for context, ratio in row["probes"].items())
    probed = ", ".join(f"{context:,}: {ratio:.2f}x" for context, ratio in probes)
    where = f"{row['found']:,} tokens (to {row['resolution']})" if row["found"] else "no context up to there"
    return f"{row['contender']}, batch {row['batch']}: decoding breaks even at {where}; probed {probed}"
