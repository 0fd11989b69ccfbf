"""A real server under load: short chats next to long documents, dense attention and QUEST alternating.

    python -m benchmarks.engine.serve [--rates 0.1 0.2] [--requests 12] [--long-share 0.33]
        [--long-tokens 6000] [--budget 1024] [--quest JSON] [--rounds 2] [--json PATH [--minutes M]]

Both servers listen on loopback; while one is under ``vllm bench serve``, the other waits. A prompt that
arrives while others decode is prefilled in chunks next to them: the counters at /metrics show that those
decode rows stay sparse, and the table says how many must be. Requests and time are bounded, and both servers
end with the run. `benchmarks.engine.throughput` has the shares of the memory's limit: here steps mix all
lengths.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("PYTHONWARNINGS", "ignore")

from benchmarks.common.arguments import command_line, json_object, of_model, of_results
from benchmarks.common.machine import command, machine
from benchmarks.common.pairs import Ratio
from benchmarks.common.results import ResultsError, ResultsFile
from benchmarks.common.tables import table
from benchmarks.engine.contenders import Contender, dense, dense_defaults, quest
from benchmarks.engine.serve_load import Load, send, sparse_rows, write_prompts
from benchmarks.engine.server import Server, ServerError, running_server
from tools.small_model import ModelError, prepare_model
from vllm_quest.config import QuestConfigError

COUNTERS = {
    "sparse": 'vllm_quest:decode_rows_total{mode="sparse"',
    "dense, short context": 'vllm_quest:decode_rows_total{mode="dense",reason="context"',
    "dense, dense layers": 'vllm_quest:decode_rows_total{mode="dense",reason="dense_layers"',
    "prefill tokens": "vllm_quest:prefill_tokens_total",
    "preemptions": "vllm:num_preemptions_total",
}
FIGURES = {
    "mean_ttft_ms": "TTFT mean",
    "p50_ttft_ms": "p50",
    "p99_ttft_ms": "p99 ms",
    "p50_tpot_ms": "TPOT p50",
    "p99_tpot_ms": "p99 ms",
    "p99_itl_ms": "ITL p99 ms",
    "output_throughput": "tokens/s",
    "request_goodput": "goodput/s",
}


def main() -> None:
    arguments = _arguments()
    try:
        run(arguments)
    except (ModelError, QuestConfigError, ResultsError, ServerError, ValueError) as error:
        sys.exit(f"error: {error}")


def run(arguments: argparse.Namespace) -> None:
    """Measures what the results file lacks, and prints everything in it."""
    model = str(arguments.model or prepare_model())
    contenders = [dense(arguments.dense), quest(arguments.quest, arguments.budget)]
    names = ("model", "requests", "long_share", "long_tokens", "output_tokens", "chunk_tokens", "goodput")
    settings = {name: str(getattr(arguments, name)) for name in names}
    settings["model"] = Path(model).name
    about = {**command(), **machine(), **settings, "QUEST": contenders[1].name}
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    results = ResultsFile(arguments.json, about, ("rate", "round"))
    deadline = time.monotonic() + 60 * arguments.minutes
    missing = [
        (rate, number)
        for rate in arguments.rates
        for number in range(arguments.rounds)
        if not results.find(rate=rate, round=number)
    ]
    if missing and arguments.minutes:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-quest-serve-")))
            servers = []
            for number, contender in enumerate(contenders):
                print(f"{contender.name}: start the server", file=sys.stderr, flush=True)
                server_args = _server_args(contender, model, arguments)
                servers.append(stack.enter_context(running_server(server_args, folder / f"log{number}")))
            for rate, number in missing:
                if time.monotonic() < deadline:
                    print(f"{rate} requests/s, round {number + 1}", file=sys.stderr, flush=True)
                    sides = _round(contenders, servers, model, folder, rate, number, arguments)
                    results.add({"rate": rate, "round": number, **sides})
    print(report(results.rows, contenders))


def _round(
    contenders: list[Contender],
    servers: list[Server],
    model: str,
    folder: Path,
    rate: float,
    number: int,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """The same requests to both servers, one after the other; who begins alternates."""
    load = Load(
        requests=arguments.requests,
        long_share=arguments.long_share,
        long_tokens=arguments.long_tokens,
        output_tokens=arguments.output_tokens,
        rate=rate,
        goodput=tuple(arguments.goodput),
    )
    seed = 1000 * number + round(1000 * rate)
    prompts = folder / "prompts.jsonl"
    write_prompts(prompts, load, seed)
    sides: dict[str, Any] = {}
    for side in (0, 1) if number % 2 else (1, 0):
        server, config = servers[side], contenders[side].quest
        before = {name: server.metric(metric) for name, metric in COUNTERS.items()}
        measured = send(server.address, model, prompts, load, seed, arguments.limit)
        figures: dict[str, Any] = {name: measured[name] for name in (*FIGURES, "completed", "duration")}
        figures["counters"] = {n: server.metric(m) - before[n] for n, m in COUNTERS.items()}
        lens = measured["input_lens"], measured["output_lens"]
        figures["input_lens"], figures["output_lens"] = lens
        if config:
            figures["sparse_rows_expected"] = sparse_rows(*lens, config)
        sides["quest" if config else "dense"] = figures
    return sides


def report(rows: list[dict[str, Any]], contenders: list[Contender]) -> str:
    """The latency table, the ratios, and the counters."""
    lines, ratios, counted = [], [], []
    for row in sorted(rows, key=lambda row: (row["rate"], row["round"])):
        for contender, side in zip(contenders, ("dense", "quest"), strict=True):
            figures = [f"{row[side][name]:.1f}" for name in FIGURES if name != "request_goodput"]
            figures.append(f"{row[side]['request_goodput']:.3f}")
            lines.append([contender.name, f"{row['rate']:g}", str(row["round"] + 1), *figures])
        counters, expected = row["quest"]["counters"], row["quest"]["sparse_rows_expected"]
        counts = [f"{value:,.0f}" for value in counters.values()]
        share = counters["sparse"] / expected if expected else 0
        counted.append([f"{row['rate']:g}", str(row["round"] + 1), *counts, f"{expected:,}", f"{share:g}"])
    for rate in sorted({row["rate"] for row in rows}):
        pairs = [row for row in rows if row["rate"] == rate]
        compared = [
            f"{label.split()[0]} {Ratio.of([p['dense'][n] for p in pairs], [p['quest'][n] for p in pairs])}"
            for n, label in (("mean_ttft_ms", "TTFT"), ("p50_tpot_ms", "TPOT"), ("p99_itl_ms", "ITL-p99"))
        ]
        ratios.append(f"{rate:g} requests/s, dense divided by QUEST: {', '.join(compared)}")
    columns = ["server", "requests/s", "round", *FIGURES.values()]
    counter_columns = ["counters", "round", *COUNTERS, "long rows per layer", "sparse layers seen"]
    return "\n" + "\n\n".join([table(columns, lines), "\n".join(ratios), table(counter_columns, counted)])


def _server_args(contender: Contender, model: str, arguments: argparse.Namespace) -> list[str]:
    from vllm.platforms import current_platform

    longest = 2 * arguments.long_tokens  # a document may have more tokens than were asked for
    server_args = [
        *("--model", model, "--max-num-seqs", "16", "--attention-backend", contender.backend),
        *("--max-model-len", str(min(longest, arguments.max_model_len))),
        *("--max-num-batched-tokens", str(arguments.chunk_tokens)),
        *("--kv-cache-memory-bytes", str(int(arguments.kv_cache_gib * 2**30))),
    ]
    if current_platform.is_cpu():
        server_args += ["--dtype", "float32", "--enforce-eager"]
    if "kv_cache_dtype" in contender.engine_args:
        server_args += ["--kv-cache-dtype", contender.engine_args["kv_cache_dtype"]]
    if contender.quest:
        server_args += ["--additional-config", json.dumps(contender.engine_args["additional_config"])]
    return server_args


def _arguments() -> argparse.Namespace:
    parser = command_line(__doc__, of_model(), of_results())
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.2], help="requests per second")
    parser.add_argument("--requests", type=int, default=12, help="of one round")
    parser.add_argument("--long-share", type=float, default=0.33)
    parser.add_argument("--long-tokens", type=int, default=6000, help="of a document, about")
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--chunk-tokens", type=int, default=512, help="vLLM's max_num_batched_tokens")
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--kv-cache-gib", type=float, default=1, help="of each server")
    parser.add_argument("--goodput", nargs="+", default=["ttft:20000", "tpot:250"], help="milliseconds")
    parser.add_argument("--budget", type=int, default=1024, help="QUEST's token_budget")
    parser.add_argument("--quest", type=json_object, default={}, metavar="JSON", help="its other fields")
    parser.add_argument("--dense", metavar="BACKEND[:KV_CACHE_DTYPE]", help="default: vLLM's choice")
    parser.add_argument("--rounds", type=int, default=2, help="of each rate")
    parser.add_argument("--limit", type=float, default=300, help="seconds that one round may take")
    arguments = parser.parse_args()
    arguments.dense = arguments.dense or dense_defaults()[0]
    return arguments


if __name__ == "__main__":
    main()
