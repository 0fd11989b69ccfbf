"""How many bytes one decode step must move, per layer: QUEST against dense attention.

    python -m benchmarks.kernels.roofline --geometry llama-3.1-8b --context 32768 --batch 8 --budget 2048

Decoding is bound by memory, so the ratio of the bytes is the speed-up that no kernel can exceed, and a
measured time can be quoted as a share of it. Everything is counted as if it came from device memory once; the
small arrays that pass from one kernel to the next stay in the L2 cache on a real GPU.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.arguments import command_line
from benchmarks.common.pairs import first_context
from benchmarks.common.results import write_json
from benchmarks.common.tables import table
from vllm_quest.config import QuestConfig
from vllm_quest.page import PageLayout

SCORE_BYTES = INDEX_BYTES = 4  # float32 scores, int32 page numbers and block tables


@dataclass(frozen=True)
class Geometry:
    """Attention heads of one rank."""

    num_heads: int
    num_kv_heads: int
    head_size: int


GEOMETRIES = {
    "llama-3.1-8b": Geometry(32, 8, 128),
    "qwen3-32b": Geometry(64, 8, 128),
    "llama-3.1-70b-tp8": Geometry(8, 1, 128),
    "mha-7b": Geometry(32, 32, 128),
}


@dataclass(frozen=True)
class Step:
    """One decode step of one layer.

    Attributes:
        geometry: The heads.
        batch: Rows, one query token each.
        context: Tokens of every row's context.
        token_budget: Tokens that QUEST reads per KV head.
        page_size: Tokens per page.
        block_size: Tokens per block of the cache.
        element_size: Bytes of one element of the model's dtype: the query, and dense attention's cache.
        kv_bytes: Of K, or V, of one token and KV head in QUEST's pages; None for the model's dtype.
        bound_bytes: Of kmin, or kmax, of one page and KV head; None for the model's dtype.
    """

    geometry: Geometry
    batch: int
    context: int
    token_budget: int = 2048
    page_size: int = 16
    block_size: int = 16
    element_size: int = 2
    kv_bytes: int | None = None
    bound_bytes: int | None = None

    @property
    def token_bytes(self) -> int:
        """K, or V, of one token in all KV heads of all rows."""
        return self.batch * self.geometry.num_kv_heads * self.geometry.head_size * self.element_size

    @property
    def query_bytes(self) -> int:
        return self.batch * self.geometry.num_heads * self.geometry.head_size * self.element_size

    @property
    def pages(self) -> int:
        return -(-self.context // self.page_size)

    def dense(self) -> dict[str, int]:
        """Bytes that dense attention moves: K and V of the context, and the small arrays."""
        return {
            "store": 2 * 2 * self.token_bytes,
            "kv": 2 * self.context * self.token_bytes,
            "q and out": 2 * self.query_bytes,
            "block table": self.batch * -(-self.context // self.block_size) * INDEX_BYTES,
        }

    def quest(self) -> dict[str, int]:
        """Bytes that QUEST moves: all of K and V, and no bounds, where the context is within the budget."""
        pairs = self.batch * self.geometry.num_kv_heads
        kv = self.token_bytes if self.kv_bytes is None else pairs * self.kv_bytes
        bound = self.token_bytes if self.bound_bytes is None else pairs * self.bound_bytes
        if self.context <= self.token_budget:
            return self.dense() | {"kv": 2 * self.context * kv}
        selected = self.token_budget // self.page_size
        return {
            # K and V of the token, in and out; the page's earlier keys, half a page on average; its bounds.
            "store": 2 * (self.token_bytes + kv) + self.page_size * kv // 2 + 2 * bound,
            "bounds": 2 * self.pages * bound,
            "kv": 2 * self.token_budget * kv,
            "q and out": 3 * self.query_bytes,  # scoring and attention both read q
            "scores": 2 * pairs * self.pages * SCORE_BYTES,
            "page indices": 2 * pairs * selected * INDEX_BYTES,
            "block table": self.batch * -(-self.context // self.block_size) * INDEX_BYTES,
        }

    def speed_up(self) -> float:
        """The most that QUEST can be faster than dense attention."""
        return sum(self.dense().values()) / sum(self.quest().values())


def quest_bytes(quest: QuestConfig, head_size: int) -> dict[str, Any]:
    """Bytes of K or V per token and of kmin or kmax per page; none where they are in the model's dtype."""
    # Only asked what depends neither on the block's length nor on the model's dtype.
    layout = PageLayout.configured(quest, quest.page_size, head_size, torch.bfloat16, for_cpu=False)
    block = layout.block
    sizes, dense_bounds = {}, 2 * block.head_size * block.dtype.itemsize
    if not layout.format.is_dense:
        sizes["kv_bytes"] = layout.format.token_bytes(block) // 2
    if not layout.format.is_dense or layout.scorer.page_bytes(block, layout.format) != dense_bounds:
        sizes["bound_bytes"] = layout.scorer.page_bytes(block, layout.format) // 2
    return sizes


def break_even(step: Step, target: float = 1.0) -> int:
    """The shortest context, in whole pages, at which the bytes allow a speed-up of more than `target`.

    Raises:
        ValueError: No context does: the bounds alone are more than that share of K and V.
    """
    if target >= step.page_size:
        raise ValueError(f"target: {target}; allowed: less than page_size, {step.page_size}")
    low, high = 0, step.token_budget
    while replace(step, context=high).speed_up() <= target:
        low, high = high, 2 * high
    return first_context(
        lambda context: replace(step, context=context).speed_up() > target, low, high, step.page_size
    )


def report(name: str, step: Step, bandwidth: float) -> dict:
    """One row of the table; `bandwidth` in GB/s."""
    dense, quest = step.dense(), step.quest()
    return {
        "geometry": name,
        **{key: value for key, value in asdict(step).items() if key != "geometry"},
        "dense": dense,
        "quest": quest,
        "speed_up": step.speed_up(),
        "break_even": break_even(step),
        "milliseconds": {
            "dense": sum(dense.values()) / (bandwidth * 1e6),
            "quest": sum(quest.values()) / (bandwidth * 1e6),
        },
    }


def table_text(rows: list[dict]) -> str:
    """A line per row of `report`; QUEST's parts are in MiB, too."""
    columns = ("geometry", "batch", "context", "budget", "page", "dense MiB", "QUEST", "limit", "break-even",
               "ms dense", "QUEST", "QUEST's parts in MiB")  # fmt: skip
    lines = []
    for row in rows:
        mib = [sum(row[kind].values()) / 2**20 for kind in ("dense", "quest")]
        parts = ", ".join(f"{part} {size / 2**20:.2f}" for part, size in row["quest"].items())
        settings = [str(row[key]) for key in ("geometry", "batch", "context", "token_budget", "page_size")]
        limits = [f"{row['speed_up']:.2f}x", str(row["break_even"])]
        times = [f"{row['milliseconds'][kind]:.4f}" for kind in ("dense", "quest")]
        lines.append([*settings, *(f"{size:.1f}" for size in mib), *limits, *times, parts])
    return table(columns, lines)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--geometry", nargs="+", choices=GEOMETRIES, default=["llama-3.1-8b"])
    parser.add_argument("--context", nargs="+", type=int, default=[4096, 32768, 131072])
    parser.add_argument("--batch", nargs="+", type=int, default=[8])
    parser.add_argument("--budget", nargs="+", type=int, default=[2048])
    parser.add_argument("--page-size", nargs="+", type=int, default=[16])
    parser.add_argument("--bandwidth", type=float, default=3350, help="GB/s; H100 SXM 3350, H200 4800")
    parser.add_argument("--json", type=Path, help="write the results there")
    arguments = parser.parse_args()
    rows = [
        report(
            name,
            Step(GEOMETRIES[name], batch, context, budget, page_size, block_size=max(16, page_size)),
            arguments.bandwidth,
        )
        for name in arguments.geometry
        for batch in arguments.batch
        for context in arguments.context
        for budget in arguments.budget
        for page_size in arguments.page_size
    ]
    print(table_text(rows))
    if arguments.json:
        write_json(arguments.json, {"bandwidth": arguments.bandwidth, "rows": rows})


if __name__ == "__main__":
    main()
