"""Which layers of a KV group are sparse, and the start-up line that says so."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

from vllm_quest.config import QuestConfig
from vllm_quest.kernels.operations import Operations
from vllm_quest.page import PageLayout

if TYPE_CHECKING:
    from vllm.model_executor.layers.attention import Attention

# Why a layer is dense: a counter's suffix, and the words of the start-up line.
DENSE_REASONS = {"layer": "dense_layers", "window": "sliding window", "budget": "token_budget=null"}

# A child of vLLM's logger: its handlers and level apply.
logger = init_logger("vllm.plugins.quest")


@dataclass(frozen=True)
class LayerPlan:
    """The layers of one KV group.

    Attributes:
        sparse: Names of the layers whose decode rows select pages.
        dense: Names of the others, each with its reason, a key of `DENSE_REASONS`: one of the first
            `dense_layers`, sliding-window attention, which reads little already, or no budget at all.
    """

    sparse: tuple[str, ...]
    dense: dict[str, str]

    @classmethod
    def of(cls, layers: dict[str, Attention], config: QuestConfig) -> LayerPlan:
        """Decides for `layers`, by name."""
        dense = {}
        for name, layer in layers.items():
            if config.token_budget is None:
                dense[name] = "budget"
            elif layer.sliding_window is not None:
                dense[name] = "window"
            elif extract_layer_index(name) < config.dense_layers:
                dense[name] = "layer"
        return cls(tuple(name for name in layers if name not in dense), dense)

    @property
    def dense_counts(self) -> dict[str, int]:
        """How many layers are dense, by reason."""
        return dict(Counter(self.dense.values()))

    def log(self, config: QuestConfig, layout: PageLayout, num_kv_heads: int, operations: Operations) -> None:
        """Logs one line: what is sparse, what is dense and why, and what the cache takes."""
        dense = []
        for reason, words in DENSE_REASONS.items():
            if names := [name for name, why in self.dense.items() if why == reason]:
                dense.append(f"layers {_ranges(names)} dense ({words})")
        logger.info(
            "QUEST: layers %s sparse; %s. %s%sKV cache per token and KV head (%d here): %d B (%s), %s; "
            "metadata %.1f %% of the cache. %s",
            _ranges(self.sparse) or "none",
            "; ".join(dense) or "no layer dense",
            _budget(config) if self.sparse else "",
            _references(config, operations),
            num_kv_heads,
            layout.content_bytes,
            layout.format.name,
            layout.scorer.words(layout.block, layout.format),
            100 * layout.metadata_share,
            _capacity(layout),
        )


def _budget(config: QuestConfig) -> str:
    return (
        f"Budget {config.token_budget} tokens = {config.budget_pages} pages of {config.page_size} "
        f"({config.sink_pages} first, {config.recent_pages} last always), "
        f"group_reduce={config.group_reduce}, min_context={config.min_context}. "
    )


def _references(config: QuestConfig, operations: Operations) -> str:
    """Says where a torch reference runs in place of kernels: it is right, and slow."""
    names = {"format": config.kv_dtype, "scorer": config.scorer}
    kinds = operations.references
    return "".join(f"{kind.capitalize()} {names[kind]} runs its torch reference, slowly. " for kind in kinds)


def _capacity(layout: PageLayout) -> str:
    """How many tokens fit, against a cache of K and V alone in the model's dtype."""
    gain = layout.block.dense_token_bytes / layout.content_bytes
    dtype = str(layout.block.dtype).removeprefix("torch.")
    return f"{gain:.2f} times the tokens of a dense {dtype} cache in the same memory."


def _ranges(names: tuple[str, ...] | list[str]) -> str:
    """Layer names as ``0-1, 5, 7-9``."""
    parts: list[list[int]] = []
    for index in sorted(extract_layer_index(name) for name in names):
        if parts and index == parts[-1][1] + 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in parts)
