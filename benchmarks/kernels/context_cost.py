"""One decode step of one layer from a thousand tokens to a million: where its time goes.

    python -m benchmarks.kernels.context_cost [--contexts 1024 ... 1048576] [--page-sizes 8 16 32]
        [--bounds-dtypes auto int8] [--kv-heads 2] [--repeats 15] [--json PATH] [--plot PATH]

No model: a random cache, the compiled CPU operations, and vLLM's dense kernel alternating with them: the
contenders of `benchmarks.kernels.cpu`. Two KV heads keep a million tokens of K and V at 2 GiB (group 4, head
size 128, float32); the parts of a step grow with the heads alike. The limit is the bytes of
`benchmarks.kernels.roofline` at the bandwidth that this run measures. On GPUs: `benchmarks.kernels.gpu`, same
contexts.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common.arguments import command_line, of_results
from benchmarks.common.machine import command, machine
from benchmarks.common.results import ResultsError, ResultsFile
from benchmarks.common.tables import table
from benchmarks.kernels.bandwidth import bandwidth
from benchmarks.kernels.cpu import GROUP, HEAD_SIZE, PARTS, TOKEN_BUDGET, Dense, Quest, measure
from benchmarks.kernels.roofline import Geometry, Step, quest_bytes
from vllm_quest.config import BOUNDS_DTYPES, QuestConfig

BLOCK_SIZE = 128  # vLLM's on CPUs
DTYPE = torch.float32


def main() -> None:
    arguments = _arguments()
    try:
        rows = run(arguments)
    except ResultsError as error:
        sys.exit(f"error: {error}")
    print(report(rows))
    if arguments.plot:
        from benchmarks.kernels.plots import plot_context_cost

        plot_context_cost(rows, arguments.plot)


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures the page sizes that the results file lacks; returns all rows."""
    shape = f"{arguments.kv_heads} KV heads, group {GROUP}, head size {HEAD_SIZE}, float32, 1 row"
    about = {**command(), **machine(), "shape": shape, "threads": torch.get_num_threads()}
    about |= {"token_budget": TOKEN_BUDGET, "repeats": arguments.repeats}
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    results = ResultsFile(arguments.json, about, ("page_size", "bounds_dtype", "context"))
    deadline = time.monotonic() + 60 * arguments.minutes
    torch.manual_seed(0)
    dense = None
    for page_size, bounds_dtype in product(arguments.page_sizes, arguments.bounds_dtypes):
        pages = {"page_size": page_size, "bounds_dtype": bounds_dtype}
        contexts = [c for c in arguments.contexts if not results.find(**pages, context=c)]
        if not contexts or time.monotonic() > deadline:
            continue
        tokens = max(arguments.contexts)
        dense = dense or Dense(BLOCK_SIZE, tokens, DTYPE, arguments.kv_heads)
        quest = Quest(BLOCK_SIZE, page_size, tokens, DTYPE, arguments.kv_heads, bounds_dtype)
        speed = bandwidth()
        for context in contexts:
            print(f"{quest.name}, {context:,} tokens", file=sys.stderr, flush=True)
            times = measure([dense, quest], context, arguments.repeats, DTYPE)
            step = Step(
                Geometry(GROUP * arguments.kv_heads, arguments.kv_heads, HEAD_SIZE),
                batch=1,
                context=context,
                token_budget=TOKEN_BUDGET,
                page_size=page_size,
                block_size=BLOCK_SIZE,
                element_size=DTYPE.itemsize,
                **quest_bytes(QuestConfig(**pages), HEAD_SIZE),
            )
            results.add({**pages, **summary(step, speed, times[dense.name], times[quest.name])})
    return results.rows


def summary(step: Step, speed: float, dense: np.ndarray, quest: np.ndarray) -> dict[str, Any]:
    """Medians in milliseconds, and the limit that the bytes set; both arrays ``[repeats, parts]``."""
    totals = np.median(dense.sum(1)), np.median(quest.sum(1))
    ratios = dense.sum(1) / quest.sum(1)
    return {
        "context": step.context,
        "bandwidth": speed,
        "dense_ms": float(totals[0]),
        "quest_ms": float(totals[1]),
        "parts_ms": dict(zip(PARTS, np.median(quest, 0).tolist(), strict=True)),
        "ratio": {
            "median": float(np.median(ratios)),
            "p10": float(np.percentile(ratios, 10)),
            "p90": float(np.percentile(ratios, 90)),
        },
        "dense_limit_ms": sum(step.dense().values()) / speed / 1e6,
        "quest_limit_ms": sum(step.quest().values()) / speed / 1e6,
    }


def report(rows: list[dict[str, Any]]) -> str:
    """All rows, then where scoring begins to dominate."""
    columns = [
        "page",
        "bounds",
        "context",
        "dense ms",
        "of limit",
        "QUEST ms",
        "of limit",
        "faster by",
        "p10-p90",
    ]
    lines = []
    for row in sorted(rows, key=lambda row: (row["page_size"], row["bounds_dtype"], row["context"])):
        ratio = row["ratio"]
        lines.append(
            [
                *(str(row["page_size"]), row["bounds_dtype"], f"{row['context']:,}"),
                *(f"{row['dense_ms']:.3f}", f"{100 * row['dense_limit_ms'] / row['dense_ms']:.0f} %"),
                *(f"{row['quest_ms']:.3f}", f"{100 * row['quest_limit_ms'] / row['quest_ms']:.0f} %"),
                *(f"{ratio['median']:.2f}x", f"{ratio['p10']:.2f}-{ratio['p90']:.2f}"),
                *(f"{row['parts_ms'][part]:.3f}" for part in PARTS),
            ]
        )
    text = "\n" + table([*columns, *PARTS], lines) + "\n"
    for page_size, bounds_dtype in sorted({(row["page_size"], row["bounds_dtype"]) for row in rows}):
        mine = [r for r in rows if (r["page_size"], r["bounds_dtype"]) == (page_size, bounds_dtype)]
        text += f"\n{page_size}-token pages, bounds {bounds_dtype}: " + "; ".join(
            f"scoring takes more than {words} from {context:,} tokens on"
            if (context := first_where_scoring_exceeds(mine, share))
            else f"scoring never takes more than {words}"
            for share, words in ((0.25, "a quarter of the step"), (0.5, "half"), (0.75, "three quarters"))
        )
    return text


def first_where_scoring_exceeds(rows: list[dict[str, Any]], share: float) -> int | None:
    """The shortest measured context from which on scoring takes more than `share` of the step."""
    found = None
    for row in sorted(rows, key=lambda row: row["context"], reverse=True):
        if row["parts_ms"]["score"] <= share * sum(row["parts_ms"].values()):
            break
        found = row["context"]
    return found


def _arguments() -> argparse.Namespace:
    parser = command_line(__doc__, of_results())
    parser.add_argument("--contexts", type=int, nargs="+", default=[2**n for n in range(10, 21)])
    parser.add_argument("--page-sizes", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--bounds-dtypes", nargs="+", choices=BOUNDS_DTYPES, default=["auto"])
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--plot", type=Path, help="write a picture there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
