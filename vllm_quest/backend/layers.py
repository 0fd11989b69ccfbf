"""Which layers of a KV group are sparse, and the start-up line that says so."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

from vllm_quest.config import QuestConfig
from vllm_quest.layout import PageLayout

if TYPE_CHECKING:
    from vllm.model_executor.layers.attention import Attention

# Why a layer is dense: a counter's suffix, and the words of the start-up line.
DENSE_REASONS = {"layer": "dense_layers", "window": "sliding window"}

# A child of vLLM's logger: its handlers and level apply.
logger = init_logger("vllm.plugins.quest")


@dataclass(frozen=True)
class LayerPlan:
    """The layers of one KV group.

    Attributes:
        sparse: Names of the layers whose decode rows select pages.
        dense: Names of the others, each with its reason, a key of `DENSE_REASONS`: one of the first
            `dense_layers`, or sliding-window attention, which reads little already.
    """

    sparse: tuple[str, ...]
    dense: dict[str, str]

    @classmethod
    def of(cls, layers: dict[str, Attention], config: QuestConfig) -> LayerPlan:
        """Decides for `layers`, by name."""
        dense = {}
        for name, layer in layers.items():
            if layer.sliding_window is not None:
                dense[name] = "window"
            elif extract_layer_index(name) < config.dense_layers:
                dense[name] = "layer"
        return cls(tuple(name for name in layers if name not in dense), dense)

    @property
    def dense_counts(self) -> dict[str, int]:
        """How many layers are dense, by reason."""
        return dict(Counter(self.dense.values()))

    def log(self, config: QuestConfig, layout: PageLayout, dtype: torch.dtype, num_kv_heads: int) -> None:
        """Logs one line: what is sparse, what is dense and why, and what a page weighs."""
        dense = []
        for reason, words in DENSE_REASONS.items():
            if names := [name for name, why in self.dense.items() if why == reason]:
                dense.append(f"layers {_ranges(names)} dense ({words})")
        vector = layout.page_size * layout.head_size * dtype.itemsize
        logger.info(
            "QUEST: layers %s sparse; %s. Budget %d tokens = %d pages of %d (%d first, %d last always), "
            "group_reduce=%s, min_context=%d. Page per KV head (%d here): K %d B, V %d B, bounds %d B; "
            "metadata %.1f %% of the cache.",
            _ranges(self.sparse) or "none",
            "; ".join(dense) or "no layer dense",
            config.token_budget,
            config.budget_pages,
            config.page_size,
            config.sink_pages,
            config.recent_pages,
            config.group_reduce,
            config.min_context,
            num_kv_heads,
            vector,
            vector,
            2 * vector // layout.page_size,
            100 * layout.metadata_share,
        )


def _ranges(names: tuple[str, ...] | list[str]) -> str:
    """Layer names as ``0-1, 5, 7-9``."""
    parts: list[list[int]] = []
    for index in sorted(extract_layer_index(name) for name in names):
        if parts and index == parts[-1][1] + 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in parts)
