"""Times one decode step of one layer on a GPU: QUEST against vLLM's kernels, 4-bit caches included.

    python -m benchmarks.kernels.gpu [--geometry llama-3.1-8b] [--context 4096 32768 131072] [--batch 1 8 64]
        [--budget 2048] [--page-size 16] [--kv-dtype auto int4] [--metadata-dtype auto int8]
        [--block-size 16] [--dense FLASH_ATTN int4_per_token_head] [--operations] [--json PATH] [--plot PATH]

A step stores one token per row and computes attention. It is captured in a CUDA graph of several layers, each
with its own cache, together larger than the L2 cache: every layer finds it cold, as in a model. Times are
medians of the graph's replays, divided by the layers. The limit is the bytes of `benchmarks.kernels.roofline`
at the device's copy bandwidth, which is measured first. ``QUEST dense`` is QUEST without a budget: store, and
attention over every page. A speed-up is QUEST's over the fastest dense kernel in the model's dtype; vLLM's
4-bit caches are shown next to it. Kernels that are not installed are named, with the reason. After the lines
come tables of all times and of the break-even contexts, and the worst case. --json is written after each
configuration. Without a GPU nothing runs.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from benchmarks.common.arguments import command_line
from benchmarks.common.machine import command, machine
from benchmarks.common.results import write_json
from benchmarks.kernels.dense import DENSE
from benchmarks.kernels.report import line, microseconds, ratios, series, summary
from benchmarks.kernels.roofline import GEOMETRIES, Step, quest_bytes
from benchmarks.kernels.steps import DTYPE, QuestLayers, Rows, dense_step
from vllm_quest.config import BOUNDS_DTYPES, QuestConfig
from vllm_quest.formats import FORMATS

MIN_LAYERS, MAX_LAYERS = 4, 64
CACHE_BYTES = 8 << 30  # of all layers of a graph, in the model's dtype
REPLAY_SECONDS = 0.5  # of one kernel: slow ones are replayed less often
MIN_REPEATS = 10


def median_ms(step: Callable[[], object], repeats: int) -> float:
    """Median time of `step`, captured in a CUDA graph."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    replay_ms(graph, 2)
    (once,) = replay_ms(graph, 1)
    times = sorted(replay_ms(graph, min(repeats, max(MIN_REPEATS, int(1e3 * REPLAY_SECONDS / once)))))
    return times[len(times) // 2]


def replay_ms(graph: torch.cuda.CUDAGraph, repeats: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def copy_bandwidth() -> float:
    """GB/s that a kernel reads and writes as it copies; a graph's own copy is slower on an H200."""
    source = torch.zeros(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / 1e6 / median_ms(lambda: torch.add(source, 1, out=target), 20)


def layer_count(rows: Rows) -> int:
    """Layers of one graph: as many as memory and patience allow, the same for all kernels."""
    geometry, tokens = rows.geometry, rows.num_blocks * rows.block_size
    layer_bytes = tokens * geometry.num_kv_heads * 2 * geometry.head_size * DTYPE.itemsize
    return max(MIN_LAYERS, min(MAX_LAYERS, CACHE_BYTES // layer_bytes))


class Measured(NamedTuple):
    """What some kernels took.

    Attributes:
        milliseconds: Per layer, by the kernel's name.
        left_out: Why a kernel has no time.
    """

    milliseconds: dict[str, float]
    left_out: dict[str, str]

    def add(self, kind: str, time: Callable[[], float]) -> None:
        try:
            self.milliseconds[kind] = time()
        except Exception as error:  # not installed, out of memory, or refused: the reason is printed
            self.left_out[kind] = f"{type(error).__name__}: {error}".splitlines()[0]
        torch.cuda.empty_cache()


class Benchmark:
    """Measures configurations, and each dense kernel once for all that differ in QUEST's settings only."""

    def __init__(self, dense: list[str], repeats: int, operations: bool) -> None:
        self.kinds, self.repeats, self.operations = dense, repeats, operations
        self.bandwidth = copy_bandwidth()
        self._dense: dict[tuple, Measured] = {}

    def layer_ms(self, step: Callable[[], object], layers: int) -> float:
        return median_ms(step, self.repeats) / layers

    def dense_ms(self, rows: Rows, kind: str) -> float:
        layers = layer_count(rows)
        return self.layer_ms(dense_step(rows, layers, kind), layers)

    def dense(self, rows: Rows) -> Measured:
        """vLLM's kernels."""
        key = rows.geometry, len(rows.query), rows.context, rows.block_size
        if key not in self._dense:
            self._dense[key] = Measured({}, {})
            for kind in self.kinds:
                self._dense[key].add(kind, partial(self.dense_ms, rows, kind))
        return self._dense[key]

    def quest(self, rows: Rows, config: QuestConfig) -> tuple[Measured, Measured]:
        """QUEST with its budget and without, and its launches alone where they are asked for."""
        found, alone, layers = Measured({}, {}), Measured({}, {}), layer_count(rows)
        try:
            quest = QuestLayers(rows, config, layers)
        except torch.OutOfMemoryError as error:
            found.left_out["QUEST"] = f"{type(error).__name__}: {error}".splitlines()[0]
            return found, alone
        found.add("QUEST", partial(self.layer_ms, quest.step, layers))
        found.add("QUEST dense", partial(self.layer_ms, quest.dense_step, layers))
        for name, launches in quest.operations().items() if self.operations else ():
            alone.add(name, partial(self.layer_ms, launches, layers))
        return found, alone

    def measure(self, name: str, step: Step, config: QuestConfig) -> dict[str, Any]:
        """One configuration: milliseconds per layer of QUEST and of each dense kernel that runs here."""
        rows = Rows(step.geometry, step.batch, step.context, step.block_size)
        quest, alone = self.quest(rows, config)
        dense = self.dense(rows)
        gb_per_s = sum(step.quest().values()) / 1e6 / quest.milliseconds.get("QUEST", math.nan)
        milliseconds = quest.milliseconds | dense.milliseconds
        row = {
            "geometry": name,
            "batch": step.batch,
            "context": step.context,
            "token_budget": step.token_budget,
            "page_size": step.page_size,
            "kv_dtype": config.kv_dtype,
            "bounds_dtype": config.bounds_dtype,
            "block_size": step.block_size,
            "layers": layer_count(rows),
            "milliseconds": milliseconds,
            **ratios(milliseconds),
            "left_out": quest.left_out | dense.left_out | alone.left_out,
            "speed_up_limit": step.speed_up(),
            "gb_per_s": gb_per_s,
            "share_of_limit": gb_per_s / self.bandwidth,
        }
        if alone.milliseconds:
            row["operations"] = alone.milliseconds
        return row


def configurations(arguments: argparse.Namespace) -> list[tuple[str, Step, QuestConfig]]:
    """All that the arguments name, with the name of the geometry."""
    found = []
    for name, batch, budget, page_size, kv_dtype, bounds_dtype, context in itertools.product(
        arguments.geometry,
        arguments.batch,
        arguments.budget,
        arguments.page_size,
        arguments.kv_dtype,
        arguments.bounds_dtype,
        arguments.context,
    ):
        geometry, block_size = GEOMETRIES[name], max(arguments.block_size, page_size)
        pages = QuestConfig(
            token_budget=budget, page_size=page_size, kv_dtype=kv_dtype, bounds_dtype=bounds_dtype
        )
        sizes = quest_bytes(pages, geometry.head_size)
        step = Step(geometry, batch, context, budget, page_size, block_size=block_size, **sizes)
        found.append((name, step, pages))
    return found


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--geometry", nargs="+", choices=GEOMETRIES, default=["llama-3.1-8b"])
    parser.add_argument("--context", nargs="+", type=int, default=[4096, 8192, 32768, 131072])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--budget", nargs="+", type=int, default=[2048])
    parser.add_argument("--page-size", nargs="+", type=int, default=[16])
    parser.add_argument("--block-size", type=int, default=16, help="or the page size, where that is larger")
    parser.add_argument("--kv-dtype", nargs="+", choices=list(FORMATS), default=["auto"])
    parser.add_argument("--bounds-dtype", nargs="+", choices=BOUNDS_DTYPES, default=["auto"])
    parser.add_argument("--dense", nargs="+", choices=DENSE, default=list(DENSE), help="vLLM's kernels")
    parser.add_argument("--operations", action="store_true", help="time each of QUEST's launches alone, too")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--plot", type=Path, help="write a picture there")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("No GPU here: nothing was measured.")
        return
    benchmark = Benchmark(arguments.dense, arguments.repeats, arguments.operations)
    results: list[dict] = []
    about = {**command(), **machine(), "Triton": triton.__version__, "bandwidth": benchmark.bandwidth}
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    for configuration in configurations(arguments):
        results.append(benchmark.measure(*configuration))
        print(line(results[-1]), flush=True)
        if arguments.json:
            write_json(arguments.json, {**about, "results": results})
    print(f"\n{microseconds(results)}\n\n{summary(results)}")
    if arguments.plot:
        from benchmarks.kernels.plots import plot_kernels

        plot_kernels(series(results), arguments.plot)


if __name__ == "__main__":
    main()
