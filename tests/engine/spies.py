"""A scorer and a format that are the package's own, but for what they write down.

Importing this registers them; `SCORER` and `INT4` are told what to record, and when.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from vllm_quest.formats import FORMATS
from vllm_quest.formats.int4 import Int4Format
from vllm_quest.formats.int4 import cpu as int4
from vllm_quest.kernels import cpu
from vllm_quest.scorers import SCORERS
from vllm_quest.scorers.minmax import MinMaxScorer
from vllm_quest.scorers.minmax import cpu as minmax

SPIED = "spied"


class ScorerSpy:
    """`minmax`'s kernels. Calls ``on_select`` with everything that led to a selection, where it is set."""

    STORES = minmax.STORES

    def __init__(self) -> None:
        self.on_select: Callable[..., None] | None = None

    def score_pages(self, query: torch.Tensor, bounds: Any, *rest: Any) -> torch.Tensor:
        scores = minmax.score_pages(query, bounds, *rest)
        self._scored = (query, bounds, *rest)
        return scores

    def select_pages(self, page_scores: torch.Tensor, *rest: Any) -> torch.Tensor:
        pages = cpu.select_pages(page_scores, *rest)
        if self.on_select is not None:
            query, bounds, block_table, num_pages, _, _ = self._scored
            self.on_select(query, bounds, block_table, num_pages, page_scores, pages)
        return pages


class Int4Spy:
    """`int4`'s kernels. Calls ``on_store`` after, and ``on_attend`` before, where they are set."""

    def __init__(self) -> None:
        self.on_store: Callable[..., None] | None = None
        self.on_attend: Callable[..., None] | None = None

    def store(self, *arguments: Any) -> None:
        int4.store(*arguments)
        if self.on_store is not None:
            self.on_store(*arguments)

    def attend_pages(self, *arguments: Any, **named: Any) -> torch.Tensor:
        if self.on_attend is not None:
            self.on_attend(*arguments)
        return int4.attend_pages(*arguments, **named)

    dequantize_blocks = staticmethod(int4.dequantize_blocks)


SCORER, INT4 = ScorerSpy(), Int4Spy()


class SpiedScorer(MinMaxScorer):
    kernels: ClassVar[Mapping[str, str]] = {"cpu": f"{__name__}:SCORER"}


class SpiedInt4(Int4Format):
    kernels: ClassVar[Mapping[str, str]] = {"cpu": f"{__name__}:INT4"}


SCORERS[SPIED], FORMATS[SPIED] = SpiedScorer, SpiedInt4
