"""Compiles every Triton kernel for every GPU target, on a machine without a GPU, and looks at what came out.

    python -m benchmarks.compile_check [--json PATH] [--targets sm_90 gfx942] [--jobs 2]

Fails where registers run out in a loop, on more shared memory than the target has, where the bulk of the data
is not loaded 16 bytes at a time or a pointer's alignment is not known, and where a masked load fills bytes in
a way that some Triton gets wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import triton

from benchmarks.compiled import Figures, figures, fills_wrongly, unaligned_pointers
from benchmarks.recorder import KIB, TARGETS, recording
from vllm_quest.kernels import triton as kernels
from vllm_quest.layout import Int4Keys, Int4Values, PageLayout, PageViews

ROWS, KV_HEADS, BLOCKS = 2, 2, 4
SCALE = 0.1


# (head size, page size, query heads per KV head)
GEOMETRIES = [
    *[(head, page, group) for head in (64, 128, 256) for page, group in ((8, 1), (16, 4), (32, 8))],
    (96, 16, 4),
    (128, 64, 16),
]
# The same, and how bounds and groups of V are stored in 4-bit pages
INT4_GEOMETRIES = [
    (64, 16, 8, "int8", 2),
    (128, 16, 4, "int8", 1),
    (128, 32, 16, "bfloat16", 4),
    (96, 64, 4, "int8", 3),
    (256, 16, 4, "int8", 8),
]


@dataclass(frozen=True)
class Case:
    """One launch configuration: the launcher's call that leads to it."""

    kernel: str
    configuration: str
    launch: Callable[[], object]


@dataclass(frozen=True)
class Result:
    kernel: str
    configuration: str
    target: str
    shared: int
    figures: Figures
    problem: str


def views(head_size: int, page_size: int, metadata_dtype: str, value_groups: int | None = None) -> PageViews:
    """Of a cache in bfloat16, or in 4 bits with `value_groups`."""
    block_size = max(32, page_size)
    layout = PageLayout(
        block_size,
        page_size,
        head_size,
        False,
        torch.bfloat16,
        kv_dtype="auto" if value_groups is None else "int4",
        metadata_dtype=metadata_dtype,
        value_groups=value_groups or 1,
    )
    cache = torch.zeros(BLOCKS, KV_HEADS, block_size, layout.content_size, dtype=layout.cache_dtype)
    return layout.views(cache)


def launch_store(
    head_size: int, page_size: int, tokens: int, metadata_dtype: str, value_groups: int | None = None
) -> None:
    pages = views(head_size, page_size, metadata_dtype, value_groups)
    key = torch.zeros(tokens, KV_HEADS, head_size, dtype=torch.bfloat16)
    kernels.store(key, key, pages.key, pages.value, pages.bounds, torch.zeros(tokens, dtype=torch.int64))


def launch_score(
    head_size: int,
    page_size: int,
    group: int,
    group_reduce: str,
    metadata_dtype: str,
    value_groups: int | None = None,
) -> None:
    query = torch.zeros(ROWS, KV_HEADS * group, head_size, dtype=torch.bfloat16)
    counts, table = torch.ones(ROWS, dtype=torch.int32), torch.zeros(ROWS, 64, dtype=torch.int32)
    bounds = views(head_size, page_size, metadata_dtype, value_groups).bounds
    kernels.score_pages(query, bounds, table, counts, SCALE, group_reduce)


def launch_select(max_pages: int) -> None:
    scores = torch.zeros(ROWS, KV_HEADS, max_pages)
    kernels.select_pages(scores, torch.ones(ROWS, dtype=torch.int32), 128, 1, 2)


def launch_attend(
    head_size: int,
    page_size: int,
    group: int,
    value_threshold: float | None,
    metadata_dtype: str = "auto",
    value_groups: int | None = None,
) -> None:
    pages = views(head_size, page_size, metadata_dtype, value_groups)
    query = torch.zeros(ROWS, KV_HEADS * group, head_size, dtype=torch.bfloat16)
    counts, table = torch.ones(ROWS, dtype=torch.int32), torch.zeros(ROWS, 64, dtype=torch.int32)
    indices = torch.zeros(ROWS, KV_HEADS, 2048 // page_size, dtype=torch.int32)
    kernels.attend_pages(
        query,
        pages.key,
        pages.value,
        table,
        counts,
        indices,
        page_size,
        SCALE,
        value_threshold=value_threshold,
    )


def launch_dequantize(head_size: int, page_size: int, metadata_dtype: str, value_groups: int) -> None:
    pages = views(head_size, page_size, metadata_dtype, value_groups)
    assert isinstance(pages.key, Int4Keys)
    assert isinstance(pages.value, Int4Values)
    block_size = pages.value.params.shape[2]
    out = torch.zeros(ROWS, KV_HEADS, block_size, 2 * head_size, dtype=torch.bfloat16)
    blocks = torch.zeros(ROWS, dtype=torch.int32)
    kernels.dequantize_blocks(pages.key, pages.value, blocks, blocks, *out.chunk(2, -1))


def int4_cases() -> list[Case]:
    """4-bit pages: each of the geometries with other bounds and groups of V."""
    found = []
    for head_size, page_size, group, bounds, groups in INT4_GEOMETRIES:
        geometry = f"head {head_size}, page {page_size}, {bounds} bounds, {groups} groups"
        steps = {"decode": 64, "prefill": 8192} if page_size == 32 else {"decode": 64}
        for name, tokens in steps.items():
            call = partial(launch_store, head_size, page_size, tokens, bounds, groups)
            found.append(Case("store_int4", f"{geometry}, {name}", call))
        for name, threshold in (("", None), (", threshold", 6.5)):
            call = partial(launch_attend, head_size, page_size, group, threshold, bounds, groups)
            found.append(Case("attend_int4", f"{geometry}, group {group}{name}", call))
        # Other strides than those of 16-bit pages.
        call = partial(launch_score, head_size, page_size, group, "max", bounds, groups)
        found.append(Case("score", f"{geometry}, group {group}, max", call))
        call = partial(launch_dequantize, head_size, page_size, bounds, groups)
        found.append(Case("dequantize", geometry, call))
    return found


def cases() -> list[Case]:
    found = []
    for head_size, page_size, group in GEOMETRIES:
        geometry = f"head {head_size}, page {page_size}"
        for bounds in ("auto", "int8"):
            suffix = "" if bounds == "auto" else f", {bounds} bounds"
            for name, tokens in (("decode", 64), ("prefill", 8192)):
                call = partial(launch_store, head_size, page_size, tokens, bounds)
                found.append(Case("store", f"{geometry}, {name}{suffix}", call))
            # `mean` differs from `max` in one instruction: once is enough.
            reduces = ("max", "softmax_mean", "mean") if head_size == 96 else ("max", "softmax_mean")
            for reduce in reduces:
                call = partial(launch_score, head_size, page_size, group, reduce, bounds)
                found.append(Case("score", f"{geometry}, group {group}, {reduce}{suffix}", call))
        for name, threshold in (("", None), (", threshold", 6.5)):
            call = partial(launch_attend, head_size, page_size, group, threshold)
            found.append(Case("attend", f"{geometry}, group {group}{name}", call))
    for max_pages in (512, 2048, 4112, 65536):
        found.append(Case("select", f"{max_pages} pages", partial(launch_select, max_pages)))
    return found + int4_cases()


def check(index: int, target_name: str) -> Result:
    """Compiles case `index` for a target."""
    case, target = cases()[index], TARGETS[target_name]
    with recording(case.kernel, target.architecture) as recorder:
        case.launch()
    compiled = recorder.compile(target.gpu)
    found, shared = figures(compiled), compiled.metadata.shared
    problems = {
        "spills": found.spills,
        f"more shared memory than {target.shared_limit // KIB} KiB": shared > target.shared_limit,
        "fills bytes by a mask": fills_wrongly(compiled.asm["ttgir"]),
        # The launchers' tensors are all aligned.
        "pointers of unknown alignment": bool(unaligned_pointers(compiled.asm["ttgir"])),
        # A page to dequantize can be smaller than what a wave loads with 16 bytes per thread.
        "no 16-byte loads": found.wide_loads == 0 and case.kernel != "dequantize",
    }
    problem = ", ".join(name for name, present in problems.items() if present)
    return Result(case.kernel, case.configuration, target_name, shared, found, problem)


def line(kernel, configuration, target, registers, shared, spilled, loops, loads, problem) -> str:
    return (
        f"{kernel:12}{configuration:77}{target:8}{registers:>10}{shared:>9}{spilled:>9}{loops:>9}{loads:>12}"
        f"  {problem}"
    ).rstrip()


HEADER = line(
    "kernel", "configuration", "target", "registers", "shared", "spilled", "in loops", "16 B loads", ""
)


def row(r: Result) -> str:
    f = r.figures
    loops = "-" if f.loop_spills is None else f.loop_spills
    loads = f"{f.wide_loads} of {f.loads}"
    return line(
        r.kernel, r.configuration, r.target, f.registers, r.shared, f.spilled, loops, loads, problem=r.problem
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--kernels", nargs="+", help="only these, such as attend_int4")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set; the interpreter compiles nothing")
    chosen = [
        index
        for index, case in enumerate(cases())
        if not arguments.kernels or case.kernel in arguments.kernels
    ]
    work = [(index, target) for index in chosen for target in arguments.targets]
    # A fresh process per worker: LLVM does not survive a fork.
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        results = []
        print(HEADER)
        for result in pool.map(check, *zip(*work, strict=True), chunksize=4):
            print(row(result), flush=True)
            results.append(result)
    failed = [result for result in results if result.problem]
    print(f"\nTriton {triton.__version__}: {len(results)} compiled, {len(failed)} with a problem")
    if arguments.json:
        entries = {"triton": triton.__version__, "results": [asdict(result) for result in results]}
        arguments.json.write_text(json.dumps(entries, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
