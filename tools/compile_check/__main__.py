"""Compiles every Triton kernel for every GPU target, on a machine without a GPU, and looks at what came out.

    python -m tools.compile_check [--json PATH] [--targets sm_90 gfx942] [--jobs 2]

Fails where registers run out in a loop, on more shared memory than the target has, where the bulk of the data
is not loaded 16 bytes at a time or a pointer's alignment is not known, and where a masked load fills bytes in
a way that some Triton gets wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import triton

from tools.compile_check.cases import cases
from tools.compile_check.check import Result, check
from tools.compile_check.recorder import TARGETS


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
        prog="python -m tools.compile_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
