"""What every device must do of every format and scorer, and on what: the lines that join a new one.

A device is a line of `HISTORIES`; a format or a scorer is a line of `COMBINATIONS` and one or two of `LINES`.
What a device, a format or a scorer has of its own is tested in a file of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels import interpreter
from tests.kernels.cache import PagedCache
from tests.kernels.device import where
from vllm_quest.config import QuestConfig

# Each is compared with the reference, and the reference with `tests.oracle`: how many random histories of a
# cache each gets. The interpreter is slow.
HISTORIES = {"cpu": 25, "triton": 2}
DEVICES = list(HISTORIES)
EVERY_DEVICE = pytest.mark.parametrize("device", DEVICES)
REFERENCE_TOO = pytest.mark.parametrize("device", ["reference", *DEVICES])
# The interpreter computes masked lanes too, and numpy warns of what it finds there.
QUIET = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

EXACT = {"bounds_dtype": "auto"}
CODED = {"bounds_dtype": "int8"}
INT4 = {"kv_dtype": "int4", "bounds_dtype": "int8"}
INT4_ROUNDED = {"kv_dtype": "int4", "bounds_dtype": "bfloat16", "value_group_size": 32}
# Arguments of `PagedCache` for random histories, and for what holds in any shape.
COMBINATIONS = [
    EXACT,
    EXACT | {"page_size": 16},
    EXACT | {"page_size": 32},
    EXACT | {"num_kv_heads": 3, "head_size": 112, "dtype": torch.bfloat16},
    CODED,
    CODED | {"page_size": 16},
    INT4 | {"block_size": 64, "head_size": 64, "page_size": 8},
    INT4 | {"block_size": 64, "head_size": 64, "page_size": 16},
    INT4_ROUNDED | {"block_size": 64, "head_size": 64, "page_size": 16},
]
# One of each format and scorer, and of each kind of bounds.
SMALL = [COMBINATIONS[0], COMBINATIONS[4], COMBINATIONS[6], COMBINATIONS[8]]
LENGTHS = [577, 1, 17, 63]


def name_of(entries: dict[str, Any]) -> str:
    return "-".join(str(value).removeprefix("torch.") for value in entries.values())


EVERY_COMBINATION = pytest.mark.parametrize("entries", COMBINATIONS, ids=name_of)
EVERY_SMALL = pytest.mark.parametrize("entries", SMALL, ids=name_of)


def dtype_on(device: str, dtype: torch.dtype) -> torch.dtype:
    """A GPU takes 16-bit caches only."""
    return dtype if where(device).type == "cpu" or dtype != torch.float32 else torch.bfloat16


def new_cache(device: str, entries: dict[str, Any], seed: int = 0) -> PagedCache:
    dtype = dtype_on(device, entries.get("dtype", torch.float32))
    return PagedCache(device, **entries | {"dtype": dtype, "seed": seed})


class Line(NamedTuple):
    """A configuration and the shape of a cache and its queries.

    The CPU compiles every kernel for every line: each value is there once or twice, not every combination.
    """

    entries: dict[str, Any]  # of `QuestConfig`
    dtype: torch.dtype
    block_size: int
    page_size: int
    head_size: int
    kv_heads: int
    group: int

    def __str__(self) -> str:
        return "-".join([name_of(self.entries), str(self.dtype).removeprefix("torch."), *map(str, self[2:])])

    @property
    def is_dense(self) -> bool:
        return QuestConfig(page_size=self.page_size, **self.entries).format.is_dense

    def cache(self, device: str, num_blocks: int = 64) -> PagedCache:
        return PagedCache(
            device,
            num_blocks=num_blocks,
            num_kv_heads=self.kv_heads,
            block_size=self.block_size,
            head_size=self.head_size,
            dtype=dtype_on(device, self.dtype),
            page_size=self.page_size,
            **self.entries,
        )


GROUPED = {"value_group_size": 32}
LINES = [
    Line(EXACT, torch.float32, 32, 16, 128, 2, 4),
    Line(EXACT, torch.bfloat16, 32, 8, 112, 3, 3),
    Line(EXACT, torch.bfloat16, 64, 64, 256, 2, 8),
    Line(EXACT, torch.float32, 128, 16, 64, 1, 1),
    Line(EXACT, torch.float16, 16, 16, 80, 2, 16),
    Line(CODED, torch.float16, 64, 32, 80, 1, 16),
    Line(CODED, torch.float32, 128, 8, 128, 2, 4),
    Line(CODED, torch.bfloat16, 64, 16, 96, 2, 3),
    Line(INT4, torch.float32, 64, 8, 128, 2, 4),
    Line(INT4 | GROUPED, torch.bfloat16, 64, 16, 64, 1, 8),
    Line(INT4 | {"bounds_dtype": "bfloat16"}, torch.float16, 64, 32, 80, 3, 1),
    Line(INT4 | GROUPED | {"bounds_dtype": "bfloat16"}, torch.bfloat16, 64, 64, 96, 2, 3),
    Line(INT4 | {"value_group_size": 64}, torch.bfloat16, 64, 16, 96, 1, 16),  # groups of 48
]
REDUCED = [LINES[0], LINES[5], LINES[8]]  # with every way to make one score of those of a group


def dense_line(dtype: torch.dtype, block_size: int = 32, head_size: int = 64, group: int = 4) -> Line:
    """Another one in pages of 8, for what is a device's own."""
    return Line(EXACT, dtype, block_size, 8, head_size, 2, group)


EVERY_LINE = pytest.mark.parametrize("line", LINES, ids=str)


class Case(NamedTuple):
    """Four requests in scattered blocks, everything unwritten poison; their rows; a query."""

    cache: PagedCache
    table: torch.Tensor
    seq_lens: torch.Tensor
    num_pages: torch.Tensor
    query: torch.Tensor

    @property
    def scale(self) -> float:
        return self.cache.layout.block.head_size**-0.5

    @property
    def tolerance(self) -> dict[str, float]:
        """Outputs differ by the order of float32 sums and one rounding to the output's dtype."""
        bound = interpreter.TOLERANCE[self.query.dtype]
        if self.cache.kernels.device == "cpu" and not self.cache.layout.format.is_dense:
            bound = max(bound, 4e-6)
        return {"rtol": bound, "atol": bound}

    def selected(self, budget: int) -> torch.Tensor:
        """The pages with the best scores, as the reference selects them."""
        reference = self.cache.reference
        scores = reference.score_pages(self.query, self.table, self.num_pages, self.scale)
        return reference.select_pages(scores, self.num_pages, budget, 1, 2)


def case_of(line: Line, device: str, lengths: list[int] | None = None) -> Case:
    """Prefill in two chunks, the first of which ends inside a page, by the reference."""
    lengths = lengths or LENGTHS
    cache = line.cache(device, 4 + sum(-(-length // line.block_size) for length in lengths))
    requests = [cache.new_request() for _ in lengths]
    halves = {request: length // 2 for request, length in zip(requests, lengths, strict=True)}
    rest = {request: length - length // 2 for request, length in zip(requests, lengths, strict=True)}
    cache.append(halves, padding=2, store=cache.reference.store)
    cache.append(rest, store=cache.reference.store)
    return Case(cache, *cache.rows(requests), cache.random(len(lengths), line.group))


def any_history(examples: int, check: Callable[..., None], *, drafts: bool = True) -> None:
    """Calls `check(steps, seed)` for random steps of an engine, with rejected drafts or without."""
    limits = settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
        derandomize=True,
    )
    given(steps=STEPS_WITH_DRAFTS if drafts else STEPS, seed=st.integers(0, 99))(limits(check))()


ACTIONS = ["append", "append", "append", "new", "share", "finish"]


def histories(*actions: str) -> st.SearchStrategy:
    """Steps of a serving engine: how many tokens up to three requests get, which one ends, what is shared."""
    return st.lists(
        st.tuples(
            st.sampled_from(actions),
            st.lists(st.sampled_from([1, 1, 1, 2, 7, 8, 17, 33]), min_size=1, max_size=3),
            st.integers(0, 3),
            st.integers(0, 2),
        ),
        min_size=3,
        max_size=14,
    )


STEPS = histories(*ACTIONS)
STEPS_WITH_DRAFTS = histories(*ACTIONS, "reject")


def run_steps(cache: PagedCache, steps: list, store: Callable[..., None] | None = None) -> None:
    cache.new_request()
    size = cache.layout.block.block_size
    for action, counts, pick, padding in steps:
        live = list(cache.requests)
        if action == "new" and len(live) < 3:
            cache.new_request()
        elif action == "share" and len(live) < 3:
            cache.new_request(prefix_of=live[pick % len(live)], prefix_blocks=1 + pick)
        elif action == "finish" and len(live) > 1:
            cache.finish(live[pick % len(live)])
        elif action == "reject":
            cache.reject(live[pick % len(live)], counts[0])
        targets = dict(zip(cache.requests, counts, strict=False))
        if sum(targets.values()) < (len(cache.free) - 3) * size:
            cache.append(targets, padding, store=store)
