"""QUEST's bound ranks the pages, and an estimate of attention's mass says how many of them a row reads.

Importing this registers the scorer, for engines of this process on CPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from benchmarks.accuracy.studies.mass import ESTIMATES, Ranking, choose, page_masses, pages_for
from vllm_quest.block import Block, Part
from vllm_quest.formats import KVFormat
from vllm_quest.kernels import cpu
from vllm_quest.kernels.bounds import PageBounds
from vllm_quest.scorers import SCORERS
from vllm_quest.scorers.minmax import MinMaxScorer
from vllm_quest.scorers.minmax import cpu as minmax

__all__ = ["SHARES", "Budget", "MassScorer", "budget_by"]

SHARES = 1 / (1 + np.exp(-np.linspace(-4, 9, 80)))  # of the mass that calibration tries, ascending


class Summary(NamedTuple):
    """The bounds of every page, and every key."""

    bounds: PageBounds
    keys: torch.Tensor  # [B, H, N, D] float32; NaN where a page that is being filled has no key yet


@dataclass
class Budget:
    """How many pages a row reads, and what it read so far.

    Attributes:
        estimate: Which estimate of the mass; None for the fixed budget.
        share: Of the mass that the pages must reach.
        calibrates: Whether the reads of every estimate at all `SHARES` are counted as well.
        pages_read: Of all rows, layers and KV heads.
        pages_in_context: Likewise.
        reads: By estimate, pages that each of `SHARES` would read.
    """

    estimate: str | None = None
    share: float = 0.0
    calibrates: bool = False
    pages_read: int = 0
    pages_in_context: int = 0
    reads: dict[str, np.ndarray] = field(
        default_factory=lambda: dict.fromkeys(ESTIMATES, np.zeros(len(SHARES)))
    )


class MassScorer(MinMaxScorer):
    """QUEST's scores; keeps the keys in float32 too, and selects by the `Budget` of `budget_by`."""

    name: ClassVar[str] = "mass"
    borrows: ClassVar[tuple[str, ...]] = ()
    kernels: ClassVar[Mapping[str, str]] = {"cpu": f"{__name__}:KERNELS"}

    def parts(self, block: Block, kv_format: KVFormat) -> dict[str, Part]:
        keys = Part((block.block_size, block.head_size), torch.float32)
        return super().parts(block, kv_format) | {"keys_again": keys}

    def summary(self, parts: Mapping[str, torch.Tensor], cache: Any, block: Block, parameters: Any) -> Any:
        return Summary(super().summary(parts, cache, block, parameters), parts["keys_again"])


class MassKernels:
    """`ScorerKernels` that remember a layer's query between scoring and selection."""

    def __init__(self) -> None:
        self.budget = Budget()

    def summarize(self, key: torch.Tensor, cache: Any, summary: Summary, slot_mapping: torch.Tensor) -> None:
        """The bounds, and the keys: NaN behind a page's last one."""
        minmax.summarize(key, cache, summary.bounds, slot_mapping)
        block_size = summary.keys.shape[2]
        page_size = block_size // summary.bounds.values.shape[2]
        real = slot_mapping >= 0
        slots = slot_mapping[real]
        ahead = (slots[:, None] + torch.arange(1, page_size)).flatten()
        same_page = ahead // page_size == (slots // page_size).repeat_interleave(page_size - 1)
        for places, keys in ((ahead[same_page], torch.nan), (slots, key[: len(real)][real].float())):
            summary.keys[places // block_size, :, places % block_size] = keys

    def score_pages(
        self,
        query: torch.Tensor,
        summary: Summary,
        block_table: torch.Tensor,
        num_pages: torch.Tensor,
        scale: float,
        group_reduce: str,
    ) -> torch.Tensor:
        self._scored = (query, summary, block_table, scale)
        return minmax.score_pages(query, summary.bounds, block_table, num_pages, scale, group_reduce)

    def select_pages(
        self,
        page_scores: torch.Tensor,
        num_pages: torch.Tensor,
        budget_pages: int,
        sink_pages: int,
        recent_pages: int,
    ) -> torch.Tensor:
        """As the CPU's, or the pages that the budget's estimate asks for: -1 where none is read."""
        budget, ranking = self.budget, Ranking(page_scores, num_pages, sink_pages, recent_pages)
        for name in ESTIMATES if budget.calibrates else ():
            budget.reads[name] = budget.reads[name] + pages_for(SHARES, self._masses(name, ranking), ranking)
        if budget.estimate is None:
            selected = cpu.select_pages(page_scores, num_pages, budget_pages, sink_pages, recent_pages)
        else:
            selected = choose(budget.share, self._masses(budget.estimate, ranking), ranking)
        budget.pages_read += int((selected >= 0).sum())
        budget.pages_in_context += int(num_pages.sum()) * page_scores.shape[1]
        return selected

    def _masses(self, estimate: str, ranking: Ranking) -> torch.Tensor:
        query, summary, block_table, scale = self._scored
        page_size = summary.keys.shape[2] // summary.bounds.values.shape[2]
        return page_masses(estimate, query, summary.keys, block_table, page_size, scale, ranking)


KERNELS = MassKernels()
SCORERS[MassScorer.name] = MassScorer


@contextmanager
def budget_by(budget: Budget) -> Iterator[None]:
    """Within it, decode rows of sparse layers read the pages that `budget` selects."""
    before, KERNELS.budget = KERNELS.budget, budget
    try:
        yield
    finally:
        KERNELS.budget = before
