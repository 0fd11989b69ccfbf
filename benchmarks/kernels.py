"""Times one decode step of one layer on a GPU: QUEST's four launches against vLLM's dense kernels.

    python -m benchmarks.kernels [--geometry llama-3.1-8b] [--context 4096 32768 131072] [--batch 1 8 64]
        [--budget 2048] [--page-size 16] [--kv-dtype auto int4]
        [--metadata-dtype auto int8] [--block-size 16] [--json PATH] [--plot PATH]

A step stores one token per row and computes attention. It is captured in a CUDA graph of several layers, each
with its own cache, together larger than the L2 cache: every layer finds it cold, as in a model. Times are
medians of the graph's replays, divided by the layers. The limit is `benchmarks.roofline`'s bytes at the
device's copy bandwidth, which is measured first. Dense kernels that are not installed are named, with the
reason. Behind the table stand the break-even contexts and the worst case. Without a GPU nothing runs.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
import triton

from benchmarks.dense_kernels import DENSE
from benchmarks.kernels_report import line, series, summary
from benchmarks.roofline import GEOMETRIES, Geometry, Step
from benchmarks.throughput_pair import quest_bytes
from vllm_quest.config import KV_DTYPES, METADATA_DTYPES, QuestConfig
from vllm_quest.kernels import triton as kernels
from vllm_quest.layout import Int4Values, PageLayout, PageViews

SINK_PAGES, RECENT_PAGES = 1, 2
DTYPE = torch.bfloat16
MAX_LAYERS = 16


def median_ms(step: Callable[[], object], repeats: int) -> float:
    """Median time of `step`, captured in a CUDA graph."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats + 3)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) for start, end in events[3:])
    return times[len(times) // 2]


def copy_bandwidth() -> float:
    """GB/s that a kernel reads and writes as it copies; a graph's own copy is slower on an H200."""
    source = torch.zeros(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / 1e6 / median_ms(lambda: torch.add(source, 1, out=target), 20)


class Rows:
    """What the kernels of both sides are given, but for the cache: scattered blocks, new K, V and q."""

    def __init__(self, geometry: Geometry, batch: int, context: int, block_size: int) -> None:
        blocks = math.ceil(context / block_size)
        self.num_blocks = batch * blocks
        table = torch.randperm(self.num_blocks, device="cuda").int().view(batch, blocks)
        self.block_table, self.context = table, context
        self.seq_lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        last = (context - 1) % block_size
        self.slot_mapping = table[:, -1].long() * block_size + last
        self.starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
        shape = (batch, geometry.num_kv_heads, geometry.head_size)
        self.key, self.value = (torch.randn(shape, device="cuda", dtype=DTYPE) for _ in range(2))
        self.query = torch.randn(batch, geometry.num_heads, geometry.head_size, device="cuda", dtype=DTYPE)
        self.out = torch.empty_like(self.query)
        self.scale = geometry.head_size**-0.5


def random_caches(rows: Rows, geometry: Geometry, block_size: int, content: int, layers: int) -> list:
    shape = (rows.num_blocks, geometry.num_kv_heads, block_size, content)
    return [torch.empty(shape, dtype=DTYPE, device="cuda").normal_() for _ in range(layers)]


def random_pages(rows: Rows, geometry: Geometry, layout: PageLayout) -> PageViews:
    """One layer's cache: random K and V, and random bounds, but kmin below kmax."""
    if not layout.is_int4:
        (cache,) = random_caches(rows, geometry, layout.block_size, layout.content_size, 1)
    else:
        shape = (rows.num_blocks, geometry.num_kv_heads, layout.block_size, layout.content_size)
        cache = torch.randint(256, shape, dtype=torch.uint8, device="cuda")
    pages = layout.views(cache)
    if isinstance(pages.value, Int4Values):
        pages.value.params.copy_(torch.tensor([-1, 2 / 15]))
    bounds, params = pages.bounds
    if params is not None:
        params.copy_(torch.tensor([-1, 2 / 255]))
    elif layout.is_int4:
        bounds.normal_()
    kmin, kmax = (bound.clone() for bound in bounds.unbind(3))
    torch.minimum(kmin, kmax, out=bounds[:, :, :, 0])
    torch.maximum(kmin, kmax, out=bounds[:, :, :, 1])
    return pages


def quest_step(rows: Rows, geometry: Geometry, layout: PageLayout, budget: int, layers: int) -> Callable:
    views = [random_pages(rows, geometry, layout) for _ in range(layers)]
    budget_pages, page_size = budget // layout.page_size, layout.page_size
    pages_to_score = (rows.seq_lens + page_size - 1) // page_size * (rows.seq_lens > budget)
    workspace = kernels.Workspace.for_decode(
        max_rows=len(rows.query),
        num_heads=geometry.num_heads,
        num_kv_heads=geometry.num_kv_heads,
        head_size=geometry.head_size,
        max_pages=rows.block_table.shape[1] * layout.pages_per_block,
        budget_pages=budget_pages,
        page_size=page_size,
        group_reduce="max",
        min_context=budget + 1,
        device=rows.query.device,
    )

    def step() -> None:
        for pages in views:
            kernels.store(rows.key, rows.value, pages.key, pages.value, pages.bounds, rows.slot_mapping)
            scores = kernels.score_pages(
                rows.query,
                pages.bounds,
                rows.block_table,
                pages_to_score,
                rows.scale,
                "max",
                workspace=workspace,
            )
            page_indices = kernels.select_pages(
                scores, pages_to_score, budget_pages, SINK_PAGES, RECENT_PAGES, workspace=workspace
            )
            kernels.attend_pages(
                rows.query,
                pages.key,
                pages.value,
                rows.block_table,
                rows.seq_lens,
                page_indices,
                page_size,
                rows.scale,
                min_context=budget + 1,
                out=rows.out,
                workspace=workspace,
            )

    return step


def dense_step(rows: Rows, geometry: Geometry, block_size: int, layers: int, kind: str) -> Callable:
    from vllm.v1.attention.backends.fa_utils import reshape_and_cache_flash

    caches = random_caches(rows, geometry, block_size, 2 * geometry.head_size, layers)
    one = torch.ones((), device="cuda")
    attend = DENSE[kind](rows)

    def step() -> None:
        for cache in caches:
            key_cache, value_cache = cache.transpose(1, 2).split(geometry.head_size, dim=-1)
            reshape_and_cache_flash(
                rows.key, rows.value, key_cache, value_cache, rows.slot_mapping, "auto", one, one
            )
            attend(key_cache, value_cache)

    return step


def measure(
    name: str, step: Step, kv_dtype: str, metadata_dtype: str, repeats: int, bandwidth: float
) -> dict:
    """One configuration: milliseconds per layer of QUEST and of each dense kernel that runs here."""
    geometry = step.geometry
    layout = PageLayout(
        step.block_size,
        step.page_size,
        geometry.head_size,
        for_cpu=False,
        dtype=DTYPE,
        kv_dtype=kv_dtype,
        metadata_dtype=metadata_dtype,
    )
    rows = Rows(geometry, step.batch, step.context, step.block_size)
    moved = sum(step.quest().values())
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    layers = max(2, min(MAX_LAYERS, math.ceil(4 * l2_bytes / moved)))
    times, left_out = {}, {}
    for kind in ("QUEST", *DENSE):
        try:
            if kind == "QUEST":
                total = median_ms(quest_step(rows, geometry, layout, step.token_budget, layers), repeats)
            else:
                total = median_ms(dense_step(rows, geometry, step.block_size, layers, kind), repeats)
            times[kind] = total / layers
        except Exception as error:  # not installed, out of memory, or refused: the reason is printed
            left_out[kind] = f"{type(error).__name__}: {error}".splitlines()[0]
        torch.cuda.empty_cache()
    quest = times.get("QUEST", math.nan)
    dense = min((time for kind, time in times.items() if kind != "QUEST"), default=math.nan)
    return {
        "geometry": name,
        "batch": step.batch,
        "context": step.context,
        "token_budget": step.token_budget,
        "page_size": step.page_size,
        "kv_dtype": kv_dtype,
        "metadata_dtype": metadata_dtype,
        "block_size": step.block_size,
        "layers": layers,
        "milliseconds": times,
        "left_out": left_out,
        "speed_up": dense / quest,
        "speed_up_limit": step.speed_up(),
        "gb_per_s": moved / 1e6 / quest,
        "share_of_limit": moved / 1e6 / quest / bandwidth,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--geometry", nargs="+", choices=GEOMETRIES, default=["llama-3.1-8b"])
    parser.add_argument("--context", nargs="+", type=int, default=[4096, 8192, 32768, 131072])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--budget", nargs="+", type=int, default=[2048])
    parser.add_argument("--page-size", nargs="+", type=int, default=[16])
    parser.add_argument("--block-size", type=int, default=16, help="or the page size, where that is larger")
    parser.add_argument("--kv-dtype", nargs="+", choices=KV_DTYPES, default=["auto"])
    parser.add_argument("--metadata-dtype", nargs="+", choices=METADATA_DTYPES, default=["auto"])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--plot", type=Path, help="write a picture there")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("No GPU here: nothing was measured.")
        return
    bandwidth = copy_bandwidth()
    device = torch.cuda.get_device_name(0)
    print(f"{device}, {bandwidth:.0f} GB/s, torch {torch.__version__}, Triton {triton.__version__}")
    results = []
    configurations = itertools.product(
        arguments.geometry,
        arguments.batch,
        arguments.budget,
        arguments.page_size,
        arguments.kv_dtype,
        arguments.metadata_dtype,
        arguments.context,
    )
    for name, batch, budget, page_size, kv_dtype, metadata_dtype, context in configurations:
        geometry = GEOMETRIES[name]
        pages = QuestConfig(
            token_budget=budget, page_size=page_size, kv_dtype=kv_dtype, metadata_dtype=metadata_dtype
        )
        sizes = quest_bytes(pages, geometry.head_size)
        step = Step(
            geometry,
            batch,
            context,
            budget,
            page_size,
            block_size=max(arguments.block_size, page_size),
            **sizes,
        )
        results.append(measure(name, step, kv_dtype, metadata_dtype, arguments.repeats, bandwidth))
        print(line(results[-1]), flush=True)
    print(f"\n{summary(results)}")
    if arguments.json:
        entries = {
            "device": device,
            "bandwidth": bandwidth,
            "date": datetime.date.today().isoformat(),
            "versions": {"torch": torch.__version__, "triton": triton.__version__},
            "results": results,
        }
        arguments.json.write_text(json.dumps(entries, indent=1) + "\n")
    if arguments.plot:
        from benchmarks.plots import plot_kernels

        plot_kernels(series(results), arguments.plot)


if __name__ == "__main__":
    main()
