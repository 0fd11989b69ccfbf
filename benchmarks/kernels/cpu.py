"""One decode step of one request: QUEST's compiled operations against vLLM's dense CPU kernel.

    python -m benchmarks.kernels.cpu [--json PATH] [--contexts 8192 32768] [--formats auto int4]

Both sides run in the same process on the same contexts, one after the other in every repeat, so that a busy
machine slows both. A step stores one token and computes one layer's attention. Requests rotate through a pool
of blocks of a gigabyte or more, and every contender has its own: between two steps of one contender the
others read theirs. THP_MEM_ALLOC_ENABLE=1 lets torch use huge pages, for both sides. Numbers are
milliseconds: the median, and the 10th and 90th percentile.
"""

from __future__ import annotations

import argparse
import os
import time
from itertools import product
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from vllm import _custom_ops as ops

from benchmarks.common.arguments import command_line
from benchmarks.common.machine import command, machine
from benchmarks.common.results import write_json
from benchmarks.common.tables import table
from vllm_quest.config import QuestConfig
from vllm_quest.kernels.operations import Operations, Shapes
from vllm_quest.kernels.operations import Rows as DecodeRows
from vllm_quest.page import PageLayout, Pages

KV_HEADS, GROUP, HEAD_SIZE = 8, 4, 128
SCALE = HEAD_SIZE**-0.5
TOKEN_BUDGET = 2048
DENSE_BLOCK_SIZES = (32, 128)  # the smallest that the kernel takes, and the platform's default
PARTS = ("store", "score", "select", "attend")
FORMATS: dict[str, dict[str, Any]] = {
    "auto": {},
    "int8-bounds": {"bounds_dtype": "int8"},
    "int4": {"kv_dtype": "int4"},
    "int4-all-pages": {"kv_dtype": "int4", "selects": False},
}


def random_cache(
    num_blocks: int, kv_heads: int, block_size: int, content: int, dtype: torch.dtype
) -> torch.Tensor:
    cache = torch.empty(num_blocks, kv_heads, block_size, content, dtype=dtype)
    return cache.uniform_(-1, 1) if dtype.is_floating_point else cache.random_()


def make_readable(pages: Pages, kv_dtype: str) -> None:
    """Replaces random bits that are no bounds or parameters."""
    values, params = pages.summary
    if params is not None:
        params.copy_(torch.tensor([-1, 2 / 255]))
    else:
        values.uniform_(-1, 1)
    values.copy_(values.sort(dim=3).values)
    if kv_dtype == "int4":
        pages.cache.value.params.copy_(torch.tensor([-1, 2 / 15]))


class Requests:
    """Block tables of requests of `context` tokens that share a pool of `tokens` tokens."""

    def __init__(self, context: int, tokens: int, block_size: int) -> None:
        blocks = context // block_size
        shuffled = torch.randperm(tokens // block_size, generator=torch.Generator().manual_seed(0)).int()
        self.block_tables = shuffled[: len(shuffled) // blocks * blocks].view(-1, 1, blocks)
        self.seq_lens = torch.tensor([context], dtype=torch.int32)
        self.block_size = block_size

    def step(self, repeat: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The block table of the request whose turn it is, and the slot of its newest token."""
        table = self.block_tables[repeat % len(self.block_tables)]
        return table, table[0, -1:].long() * self.block_size + self.block_size - 1


class Dense:
    """vLLM's kernel over the whole context."""

    def __init__(self, block_size: int, tokens: int, dtype: torch.dtype, kv_heads: int = KV_HEADS) -> None:
        self.name = f"dense, {block_size}-token blocks"
        self.block_size, self.tokens, self.dtype, self.kv_heads = block_size, tokens, dtype, kv_heads
        cache = random_cache(tokens // block_size, kv_heads, block_size, 2 * HEAD_SIZE, dtype)
        self.caches = cache.view(len(cache), kv_heads, 2 * block_size, HEAD_SIZE).chunk(2, dim=2)

    def prepare(self, context: int) -> None:
        self.requests = Requests(context, self.tokens, self.block_size)
        self.starts = torch.tensor([0, 1], dtype=torch.int32)
        self.metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=1,
            num_heads=self.kv_heads * GROUP,
            num_kv_heads=self.kv_heads,
            head_dim=HEAD_SIZE,
            seq_lens=self.requests.seq_lens,
            dtype=self.dtype,
            query_start_loc=self.starts,
            causal=True,
            sliding_window_size=-1,
            isa="vec",
            enable_kv_split=True,
        )

    def step(self, repeat: int, query, key, value) -> list[float]:
        table, slots = self.requests.step(repeat)
        out = torch.empty_like(query)
        start = time.perf_counter()
        ops.cpu_attn_reshape_and_cache(key, value, *self.caches, slots, "vec")
        ops.cpu_attention_with_kv_cache(
            query, *self.caches, out, self.starts, self.requests.seq_lens, SCALE, True, None, -1, table, 0.0,
            self.metadata, None,
        )  # fmt: skip
        return [time.perf_counter() - start]


class Quest:
    """The four operations."""

    def __init__(
        self,
        block_size: int,
        page_size: int,
        tokens: int,
        dtype: torch.dtype,
        kv_heads: int = KV_HEADS,
        bounds_dtype: str = "auto",
        kv_dtype: str = "auto",
        selects: bool = True,
    ) -> None:
        formats = [kv_dtype] * (kv_dtype != "auto") + [f"{bounds_dtype} bounds"] * (bounds_dtype != "auto")
        self.name = ", ".join([f"QUEST{'' if selects else ', all'}, {page_size}-token pages", *formats])
        self.block_size, self.tokens, self.kv_heads = block_size, tokens, kv_heads
        self.selects = selects
        self.config = QuestConfig(
            token_budget=TOKEN_BUDGET, page_size=page_size, kv_dtype=kv_dtype, bounds_dtype=bounds_dtype
        )
        layout = PageLayout.configured(self.config, block_size, HEAD_SIZE, dtype, for_cpu=True)
        shape = (tokens // block_size, kv_heads, block_size, layout.content_size)
        self.pages = layout.views(random_cache(*shape, layout.cache_dtype))
        make_readable(self.pages, kv_dtype)
        start = time.perf_counter()
        shapes = Shapes(kv_heads * GROUP, kv_heads, 1, tokens // page_size, False, torch.device("cpu"))
        self.quest = Operations(layout, self.config, "cpu", shapes)
        self.compile_seconds = time.perf_counter() - start

    def prepare(self, context: int) -> None:
        self.requests = Requests(context, self.tokens, self.block_size)
        self.num_pages = self.requests.seq_lens // self.config.page_size

    def step(self, repeat: int, query, key, value) -> list[float]:
        """Seconds of each part."""
        quest, pages, (table, slots) = self.quest, self.pages, self.requests.step(repeat)
        rows = DecodeRows(table, self.requests.seq_lens, self.num_pages)
        clock = [time.perf_counter()]
        quest.store(key, value, pages, slots)
        clock.append(time.perf_counter())
        if not self.selects:
            quest.attend_pages(query, pages, rows, None, SCALE)
            return [clock[1] - clock[0], 0, 0, time.perf_counter() - clock[1]]
        scores = quest.score_pages(query, pages, rows, SCALE)
        clock.append(time.perf_counter())
        selected = quest.select_pages(scores, rows)
        clock.append(time.perf_counter())
        quest.attend_pages(query, pages, rows, selected, SCALE)
        clock.append(time.perf_counter())
        return list(np.diff(clock))


def measure(contenders: list, context: int, repeats: int, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """Milliseconds of each contender, ``[repeats, parts]``."""
    seconds: dict[str, list] = {contender.name: [] for contender in contenders}
    for contender in contenders:
        contender.prepare(context)
    kv_heads = contenders[0].kv_heads
    for repeat in range(-2, repeats):
        query = torch.randn(1, kv_heads * GROUP, HEAD_SIZE).to(dtype)
        key, value = torch.randn(2, 1, kv_heads, HEAD_SIZE).to(dtype)
        for contender in contenders:
            parts = contender.step(repeat, query, key, value)
            if repeat >= 0:
                seconds[contender.name].append(parts)
    return {name: np.array(rows) * 1e3 for name, rows in seconds.items()}


def summary(milliseconds: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(milliseconds.sum(1), [10, 50, 90])
    return {"p10": float(low), "median": float(median), "p90": float(high)}


def report(times: dict[str, np.ndarray], context: int, dtype: torch.dtype) -> list[dict]:
    """Prints one context's table and returns its rows."""
    totals = {name: summary(rows) for name, rows in times.items()}
    dense = min((name for name in times if name.startswith("dense")), key=lambda name: totals[name]["median"])
    rows, lines = [], []
    for name, samples in times.items():
        total = totals[name]
        row: dict[str, Any] = {"context": context, "dtype": str(dtype)[6:], "name": name, **total}
        row["ratio"] = totals[dense]["median"] / total["median"]
        row["ratio_p10"] = totals[dense]["p10"] / total["p10"]
        parts = [""] * len(PARTS)
        if not name.startswith("dense"):
            row["parts"] = dict(zip(PARTS, np.median(samples, 0).tolist(), strict=True))
            parts = [f"{part:.3f}" for part in row["parts"].values()]
        figures = [f"{total[key]:.3f}" for key in ("median", "p10", "p90")]
        loss = "LOSES" if row["ratio"] < 1 and name.startswith("QUEST") else ""
        lines.append([name, *figures, f"{row['ratio']:.2f}x", *parts, loss])
        rows.append(row)
    columns = (f"{context:,} tokens, {str(dtype)[6:]}", "median", "p10", "p90", "faster by", *PARTS, "")
    print(f"\n{table(columns, lines)}")
    return rows


def compare(dtype: torch.dtype, arguments: argparse.Namespace) -> list[dict]:
    """Measures and prints every context in one dtype."""
    token_bytes = 2 * KV_HEADS * HEAD_SIZE * dtype.itemsize
    tokens = max(max(arguments.contexts), 2**30 // token_bytes)
    print(f"\n{str(dtype)[6:]}: K and V of each contender's pool take {tokens * token_bytes >> 20} MiB")
    contenders: list = [Dense(block_size, tokens, dtype) for block_size in DENSE_BLOCK_SIZES]
    for page_size, name in product(arguments.page_sizes, arguments.formats):
        contenders.append(Quest(arguments.block_size, page_size, tokens, dtype, **FORMATS[name]))
        print(f"{contenders[-1].name}: compiled or loaded in {contenders[-1].compile_seconds:.2f} s")
    rows: list[dict] = []
    for context in arguments.contexts:
        rows += report(measure(contenders, context, arguments.repeats, dtype), context, dtype)
    return rows


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 8192, 32768, 131072])
    parser.add_argument("--page-sizes", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--formats", nargs="+", default=["auto"], choices=FORMATS)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument(
        "--block-size", type=int, default=128, help="QUEST's; the dense kernel has its own two"
    )
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    about = {
        **command(),
        **machine(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "numba": numba.__version__,
        "huge pages": "yes" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else "no",
        "shape": f"{KV_HEADS} KV heads, group {GROUP}, head size {HEAD_SIZE}, budget {TOKEN_BUDGET}, 1 row",
    }
    rows: list[dict] = []
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    for dtype in (getattr(torch, name) for name in arguments.dtypes):
        rows += compare(dtype, arguments)
    if arguments.json:
        write_json(arguments.json, {"machine": about, "rows": rows})


if __name__ == "__main__":
    main()
