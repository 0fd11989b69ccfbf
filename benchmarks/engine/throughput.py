"""vLLM's own engine with its dense backends and with QUEST: prefill, decode, memory, break-even.

    python -m benchmarks.engine.throughput [--model PATH | --geometry llama-3.1-8b [--layers N]]
        [--contexts 4096 7936] [--batches 1 4] [--budgets 1024] [--dense CPU_ATTN] [--quest JSON ...]
        [--engine-args JSON] [--repeats 5] [--break-even] [--json PATH [--minutes M]]

The first dense backend is the baseline. Every other contender runs next to it, each in an engine of its own.
The two alternate, so that a ratio compares two moments that lie close together. Printed are medians; a ratio
is followed by the lowest and the highest of its pairs. Times are those that vLLM stamps on its requests. A
backend that cannot run here is named with its reason. With --json a run that was stopped continues where it
was. (`vllm bench latency` and `throughput` start an engine per figure, so they cannot alternate.)
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

# Before vLLM is imported: the report stays readable. VLLM_LOGGING_LEVEL=INFO brings vLLM's own lines back.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("PYTHONWARNINGS", "ignore")

from benchmarks.common.arguments import command_line, json_object, of_results
from benchmarks.common.machine import command, machine
from benchmarks.common.results import ResultsError, ResultsFile
from benchmarks.engine.contenders import Contender, dense, dense_defaults, quest
from benchmarks.engine.dummy_model import SIZES, write_config
from benchmarks.engine.run import Engine
from benchmarks.engine.throughput_pair import Pair
from benchmarks.engine.throughput_report import report
from benchmarks.kernels.bandwidth import bandwidth
from tools.small_model import ModelError, prepare_model
from vllm_quest.config import QuestConfigError

KEYS = ("contender", "kind", "context", "batch")


def main() -> None:
    arguments = _arguments()
    try:
        contenders = [dense(name) for name in arguments.dense or dense_defaults()]
        contenders += [quest(e, b) for e in arguments.quest for b in arguments.budgets]
        with tempfile.TemporaryDirectory(prefix="vllm-quest-model-") as folder:
            run(contenders, _model_args(arguments, Path(folder)), arguments)
    except (ModelError, QuestConfigError, ResultsError, ValueError) as error:
        sys.exit(f"error: {error}")


def run(contenders: list[Contender], model_args: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Measures what the results file lacks, and prints everything in it."""
    about = {**command(), **machine(), **_settings(arguments)}
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    results = ResultsFile(arguments.json, about, KEYS)
    deadline = time.monotonic() + 60 * arguments.minutes
    if arguments.minutes:
        speed = bandwidth()
        baseline, *others = contenders
        with ExitStack() as stack:
            base: Engine | None = None
            for contender in others:
                cells = _missing(contender, results, arguments)
                if not cells or time.monotonic() > deadline:
                    continue
                if base is None:
                    base = _start(baseline, model_args)
                    stack.callback(base.close)
                _measure(baseline, base, contender, cells, model_args, speed, results, deadline, arguments)
    print(report(results.rows))
    if arguments.plot:
        from benchmarks.engine.plots import plot_throughput

        plot_throughput(results.rows, arguments.plot)


def _missing(contender: Contender, results: ResultsFile, arguments: argparse.Namespace) -> list[tuple]:
    """(kind, context, batch) of what is still to be measured."""
    if results.find(contender=contender.name, kind="skipped", context=0, batch=0):
        return []
    cells = [("cell", context, batch) for context in arguments.contexts for batch in arguments.batches]
    if arguments.break_even and contender.quest and contender.quest.token_budget:
        cells += [("break-even", 0, batch) for batch in arguments.batches]
    return [
        cell
        for cell in cells
        if not results.find(contender=contender.name, kind=cell[0], context=cell[1], batch=cell[2])
    ]


def _measure(
    baseline: Contender,
    base: Engine,
    contender: Contender,
    cells: list[tuple],
    model_args: dict[str, Any],
    speed: float,
    results: ResultsFile,
    deadline: float,
    arguments: argparse.Namespace,
) -> None:
    """One contender next to the baseline, cell by cell until `deadline`."""
    try:
        engine = _start(contender, model_args)
    except Exception as error:  # whatever vLLM says of a backend that is not there is the finding
        if contender.quest:
            raise
        reason = str(error).strip().split("\n")[-1]
        results.add(
            {"contender": contender.name, "kind": "skipped", "context": 0, "batch": 0, "reason": reason}
        )
        return
    with ExitStack() as stack:
        stack.callback(engine.close)
        pair = Pair((baseline, base), (contender, engine), speed, arguments.steps, arguments.repeats)
        for kind, context, batch in cells:
            if time.monotonic() > deadline:
                return
            _progress(f"{contender.name} against {baseline.name}: {kind}, context {context}, batch {batch}")
            if kind == "cell":
                row = pair.cell(context, batch)
            else:
                row = pair.break_even(batch, max(arguments.contexts))
            results.add({"contender": contender.name, "kind": kind, "context": context, "batch": batch} | row)


def _start(contender: Contender, model_args: dict[str, Any]) -> Engine:
    """An engine that runs what it was asked for.

    Raises:
        ValueError: vLLM runs another backend, which it does without a word where a platform has only one.
    """
    _progress(f"{contender.name}: start the engine")
    engine = Engine(**(model_args | contender.engine_args))
    (backends,) = {tuple(names) for names in engine.llm.collective_rpc("attention_backends")}
    if backends != (contender.backend,):
        engine.close()
        raise ValueError(f"--dense: {contender.name}: vLLM runs {', '.join(backends)} here instead")
    return engine


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _model_args(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What every engine is started with."""
    longest = max(arguments.contexts) + arguments.steps + 1
    common: dict[str, Any] = {
        "max_model_len": longest,
        "max_num_seqs": max(arguments.batches),
        "kv_cache_memory_bytes": int(arguments.kv_cache_gib * 2**30),
    }
    if arguments.dtype:
        common["dtype"] = arguments.dtype
    common |= arguments.engine_args
    if not arguments.geometry:
        return common | {"model": str(arguments.model or prepare_model())}
    write_config(folder, arguments.geometry, arguments.layers, longest)
    return common | {"model": str(folder), "load_format": "dummy", "skip_tokenizer_init": True}


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What must not differ between the rows of one file."""
    layers = f", {arguments.layers} layers" if arguments.layers else ""
    name = f"{arguments.geometry}{layers}, random weights" if arguments.geometry else None
    return {
        "model": name or (arguments.model.name if arguments.model else "SmolLM2-135M-Instruct"),
        "dtype": arguments.dtype or "the platform's",
        "KV cache, GiB": arguments.kv_cache_gib,
        "decode steps": arguments.steps,
        "repeats": arguments.repeats,
        "threads": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "vLLM's choice"),
        **({"engine arguments": json.dumps(arguments.engine_args)} if arguments.engine_args else {}),
    }


def _arguments() -> argparse.Namespace:
    parser = command_line(__doc__, of_results())
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", type=Path, help="model folder; default: SmolLM2-135M-Instruct")
    model.add_argument("--geometry", choices=SIZES, help="random weights in this model's shapes")
    parser.add_argument("--layers", type=int, help="of --geometry; default: all")
    parser.add_argument("--dtype", help="default: float32 on CPUs, the model's on GPUs")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 4096, 7936], help="prompt tokens")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--budgets", type=int, nargs="+", default=[1024], help="QUEST's token_budget")
    parser.add_argument(
        "--dense", nargs="+", metavar="BACKEND[:KV_CACHE_DTYPE]", help="default: all there are"
    )
    parser.add_argument(
        "--quest",
        nargs="+",
        type=json_object,
        default=[{}],
        metavar="JSON",
        help="QUEST's other fields, a contender each",
    )
    parser.add_argument("--kv-cache-gib", type=float, default=2, help="of each engine")
    parser.add_argument(
        "--engine-args",
        type=json_object,
        default={},
        metavar="JSON",
        help="more arguments of vLLM's LLM, both sides",
    )
    parser.add_argument("--steps", type=int, default=32, help="decode steps of one timing")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--break-even", action="store_true", help="search the shortest context that pays")
    parser.add_argument("--plot", type=Path, help="write a picture there")
    arguments = parser.parse_args()
    if arguments.layers and not arguments.geometry:
        parser.error("--layers: needs --geometry")
    if min(arguments.repeats, arguments.steps, *arguments.contexts, *arguments.batches) < 1:
        parser.error("--repeats, --steps, --contexts, --batches: at least 1")
    return arguments


if __name__ == "__main__":
    main()
