"""Negative controls: scorers broken on purpose, which a benchmark that is worth its name must show.

Importing this registers them, for engines of this process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from vllm_quest.scorers import SCORERS
from vllm_quest.scorers.minmax import MinMaxScorer
from vllm_quest.scorers.minmax import cpu as sound

__all__ = ["BROKEN"]


class ReversedOrder(MinMaxScorer):
    """The worst pages first."""

    name: ClassVar[str] = "reversed_order"
    kernels: ClassVar[Mapping[str, str]] = {"cpu": f"{__name__}:ReversedOrder"}
    STORES = sound.STORES

    @staticmethod
    def score_pages(*arguments: Any) -> torch.Tensor:
        return -sound.score_pages(*arguments)


class MeanOverLayer(MinMaxScorer):
    """One score for all KV heads of a layer."""

    name: ClassVar[str] = "mean_over_layer"
    kernels: ClassVar[Mapping[str, str]] = {"cpu": f"{__name__}:MeanOverLayer"}
    STORES = sound.STORES

    @staticmethod
    def score_pages(*arguments: Any) -> torch.Tensor:
        scores = sound.score_pages(*arguments)
        return scores.mean(dim=1, keepdim=True).expand_as(scores).contiguous()


BROKEN = (ReversedOrder, MeanOverLayer)
SCORERS.update({scorer.name: scorer for scorer in BROKEN})
