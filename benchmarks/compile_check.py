"""Compiles every Triton kernel for every GPU target, on a machine without a GPU, and looks at what came out.

    python -m benchmarks.compile_check [--json PATH] [--targets sm_90 gfx942] [--jobs 2]

The launchers run on small CPU tensors with their kernels replaced by a recorder, so what is compiled is what
would be launched, with Triton's own specialization of the arguments. Fails where registers run out, on more
shared memory than the target has, where the bulk of the data is not loaded 16 bytes at a time, and where a
masked load fills bytes in a way that some Triton gets wrong.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default, but Triton 3.9 warns without it

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from vllm_quest.kernels import triton as kernels
from vllm_quest.layout import Int4Keys, Int4Values, PageLayout, PageViews

KIB = 1024
ROWS, KV_HEADS, BLOCKS = 2, 2, 4
SCALE = 0.1


@dataclass(frozen=True)
class Target:
    gpu: GPUTarget
    architecture: str  # row of the launch table
    shared_limit: int  # bytes a program may have


# sm_80 stands for its whole family: sm_86 and sm_89 run the same launches with 99 KiB.
TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), "ampere", 99 * KIB),
    "sm_90": Target(GPUTarget("cuda", 90, 32), "hopper", 227 * KIB),
    "sm_100": Target(GPUTarget("cuda", 100, 32), "blackwell", 227 * KIB),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), "cdna", 64 * KIB),
}
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
    registers: int
    shared: int
    spilled: int
    wide_loads: int
    loads: int
    problem: str


class Recorder:
    """Stands in for a kernel and keeps what it would have been launched with."""

    def __init__(self, kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid):
        self.grid = grid
        return self.record

    def record(self, *args, **kwargs) -> None:
        self.args, self.kwargs = args, kwargs

    def pack(self, gpu: GPUTarget):
        """As `JITFunction.run` does: arguments by name, their types, what to compile with which options."""
        backend = make_backend(gpu)
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialization, _ = bind(*self.args, **self.kwargs)
        options, signature, constants, attributes = self.kernel._pack_args(
            backend, self.kwargs, bound, specialization, None
        )
        return bound, signature, ASTSource(self.kernel, signature, constants, attributes), options.__dict__

    def compile(self, gpu: GPUTarget):
        """The kernel, for what it would have been launched with."""
        _, _, source, options = self.pack(gpu)
        return triton.compile(source, target=gpu, options=options)

    def parameters(self, gpu: GPUTarget) -> list:
        """The arguments that are not compiled in, in the order of the compiled kernel's parameters."""
        bound, signature, _, _ = self.pack(gpu)
        return [bound[name] for name, kind in signature.items() if kind != "constexpr"]


@contextmanager
def recording(name: str, architecture: str) -> Iterator[Recorder]:
    """Stands in for the kernel of module `name`, whose launcher believes to be on a GPU of `architecture`."""
    launch = importlib.import_module("vllm_quest.kernels.triton.launch")
    module = importlib.import_module(f"vllm_quest.kernels.triton.{name}")
    recorder = Recorder(getattr(module, f"_{name}_kernel"))
    with (
        mock.patch.object(module, f"_{name}_kernel", recorder),
        mock.patch.object(launch, "architecture", return_value=architecture),
    ):
        yield recorder


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


def launch_score(head_size: int, page_size: int, group: int, group_reduce: str, metadata_dtype: str) -> None:
    query = torch.zeros(ROWS, KV_HEADS * group, head_size, dtype=torch.bfloat16)
    counts, table = torch.ones(ROWS, dtype=torch.int32), torch.zeros(ROWS, 64, dtype=torch.int32)
    bounds = views(head_size, page_size, metadata_dtype).bounds
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
    for max_pages in (512, 2048, 65536):
        found.append(Case("select", f"{max_pages} pages", partial(launch_select, max_pages)))
    return found + int4_cases()


def run_tool(name: str, *arguments: str) -> str:
    tool = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def figure(name: str, text: str) -> int:
    """The number behind `name`, as the compilers print it."""
    found = re.search(rf"{name}:?\s*(\d+)", text)
    if found is None:
        raise RuntimeError(f"the compiler's output has no {name}")
    return int(found.group(1))


def nvidia_figures(compiled) -> tuple[int, int, int, int]:
    """Registers, spilled bytes, 16-byte loads and all loads from device memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = run_tool("cuobjdump", "-res-usage", cubin.name)
        sass = run_tool("nvdisasm", "-c", cubin.name)
    loads = re.findall(r"\b(?:LDG|LDGSTS)\.E\S*", sass)
    # What is spilled lies on the stack, and our kernels put nothing else there.
    return figure("REG", usage), figure("STACK", usage), sum(".128" in load for load in loads), len(loads)


def amd_figures(compiled) -> tuple[int, int, int, int]:
    text = compiled.asm["amdgcn"]
    # Scalar registers spill into vector registers; where those run out, ScratchSize says so.
    spilled = sum(figure(name, text) for name in (r"\.vgpr_spill_count", "ScratchSize"))
    loads = re.findall(r"\b(?:global|buffer)_load_\w+", text)
    return figure(r"\.vgpr_count", text), spilled, sum("dwordx4" in load for load in loads), len(loads)


def fills_wrongly(ttgir: str) -> bool:
    """Whether a masked load puts negative bytes or halves in: Triton 3.6 extends their sign over a word."""
    negative = set(re.findall(r"(%\w+) = arith\.constant dense<-\d+> : tensor<[^>]*xi(?:8|16)\b", ttgir))
    loads = re.findall(r"tt\.load %[^,\n]+, %[^,\n]+, (%\w+)|mask %\S+ other (%\w+)", ttgir)
    return any(negative & set(found) for found in loads)


def check(index: int, target_name: str) -> Result:
    """Compiles case `index` for a target."""
    case, target = cases()[index], TARGETS[target_name]
    with recording(case.kernel, target.architecture) as recorder:
        case.launch()
    compiled = recorder.compile(target.gpu)
    figures = nvidia_figures if target.gpu.backend == "cuda" else amd_figures
    registers, spilled, wide, loads = figures(compiled)
    # ptxas puts loop invariants on the stack, too, to have more programs at once; that is its choice.
    limit = min(255, 65536 // (32 * compiled.metadata.num_warps)) if target.gpu.backend == "cuda" else 0
    shared = compiled.metadata.shared
    problems = {
        "spills": spilled > 0 and registers > limit - 8,
        f"more shared memory than {target.shared_limit // KIB} KiB": shared > target.shared_limit,
        "fills bytes by a mask": fills_wrongly(compiled.asm["ttgir"]),
        # A page to dequantize can be smaller than what a wave loads with 16 bytes per thread.
        "no 16-byte loads": wide == 0 and case.kernel != "dequantize",
    }
    problem = ", ".join(name for name, found in problems.items() if found)
    return Result(
        case.kernel, case.configuration, target_name, registers, shared, spilled, wide, loads, problem
    )


def line(kernel, configuration, target, registers, shared, spilled, loads, problem) -> str:
    return (
        f"{kernel:12}{configuration:60}{target:8}{registers:>10}{shared:>9}{spilled:>9}{loads:>12}  {problem}"
    ).rstrip()


HEADER = line("kernel", "configuration", "target", "registers", "shared", "spilled", "16 B loads", problem="")


def row(r: Result) -> str:
    loads = f"{r.wide_loads} of {r.loads}"
    return line(
        r.kernel, r.configuration, r.target, r.registers, r.shared, r.spilled, loads, problem=r.problem
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
