"""What a layer does with its pages: store, score, select, attend. One format, one scorer, one device.

A device is a folder here and a line in `DEVICES`: a module with `select_pages` and `prepare`. What it runs
of a format or a scorer is the module that these name for it. The CPU also runs a torch reference.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from vllm_quest.page import PageLayout, Pages

if TYPE_CHECKING:
    from vllm_quest.config import QuestConfig
    from vllm_quest.formats import KVFormat
    from vllm_quest.scorers import PageScorer

__all__ = ["DEVICES", "Operations", "Rows", "Shapes"]

DEVICES = {"cpu": "vllm_quest.kernels.cpu", "triton": "vllm_quest.kernels.triton"}


@dataclass(frozen=True)
class Rows:
    """The query tokens of a decode step; a row each, also where a request decodes several tokens.

    Attributes:
        block_table: ``[R, M]`` int32.
        seq_lens: ``[R]`` int32, tokens that each row may see, itself included; 0 for a padding row.
        num_pages: ``[R]`` int32, pages in that context; 0 where the row reads all of them, and scoring and
            selection have nothing to do.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    num_pages: torch.Tensor


@dataclass(frozen=True)
class Shapes:
    """How large a step of one KV group can be, on one rank.

    Attributes:
        num_heads: Query heads.
        num_kv_heads: KV heads.
        max_rows: Most query tokens of one decode step.
        max_pages: Pages of the block table's width.
        reads_everything: Some layers read every page of every row, by our kernels.
        device: Where the tensors are.
        parameters: Of one layer, whichever, as its scorer has loaded them: for warming up.
    """

    num_heads: int
    num_kv_heads: int
    max_rows: int
    max_pages: int
    reads_everything: bool
    device: torch.device
    parameters: Any = None


class Operations:
    """The operations of one KV group under one configuration.

    Attributes:
        references: Kinds whose torch reference runs, for want of kernels of this device: ``format``,
            ``scorer``. Empty on a device that only runs kernels of its own.
    """

    def __init__(self, layout: PageLayout, config: QuestConfig, device: str, shapes: Shapes) -> None:
        """Loads the kernels of `device`, a key of `DEVICES`, and lets it prepare.

        Raises:
            ValueError: The format or the scorer has none for this device; names it.
        """
        self._layout, self._config = layout, config
        device_kernels = import_module(DEVICES[device])  # first: what it sets up holds for all kernels
        self.references: list[str] = []
        self._format = self._kernels("format", layout.format, device)
        self._scorer = self._kernels("scorer", layout.scorer, device)
        self._select_pages: Callable[..., torch.Tensor] = getattr(
            self._scorer, "select_pages", device_kernels.select_pages
        )
        self._store = self._composed_store(device)
        self._scratch: dict[str, Any] = {}
        self._scratch = device_kernels.prepare(self, layout, config, shapes)

    def store(self, key: torch.Tensor, value: torch.Tensor, pages: Pages, slot_mapping: torch.Tensor) -> None:
        """Writes K, V and the summary of new tokens.

        Args:
            key: ``[T, H, D]``, the model's dtype.
            value: ``[T, H, D]``.
            pages: One layer's, written.
            slot_mapping: ``[T]`` int64, ``block * N + position in the block``; -1 is padding.
        """
        self._store(key, value, pages, slot_mapping)

    def score_pages(self, query: torch.Tensor, pages: Pages, rows: Rows, scale: float) -> torch.Tensor:
        """One score per page and KV head, ``[R, H, M * P]`` float32; `query` is ``[R, Hq, D]``."""
        return self._scorer.score_pages(
            query,
            pages.summary,
            rows.block_table,
            rows.num_pages,
            scale,
            self._config.group_reduce,
            **self._scratch,
        )

    def select_pages(self, page_scores: torch.Tensor, rows: Rows) -> torch.Tensor:
        """The pages that each row reads, ``[R, H, K]`` int32: page numbers, -1 for none."""
        config = self._config
        return self._select_pages(
            page_scores,
            rows.num_pages,
            config.budget_pages,
            config.sink_pages,
            config.recent_pages,
            **self._scratch,
        )

    def attend_pages(
        self,
        query: torch.Tensor,
        pages: Pages,
        rows: Rows,
        page_indices: torch.Tensor | None,
        scale: float,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention over the selected pages, ``[R, Hq, D]``, to `out`; over all where none are selected."""
        return self._format.attend_pages(
            query,
            pages.cache,
            rows.block_table,
            rows.seq_lens,
            page_indices,
            self._config.page_size,
            scale,
            sparse_context=self._config.sparse_context,
            value_threshold=self._config.value_threshold,
            out=out,
            **self._scratch,
        )

    def dequantize_blocks(
        self,
        pages: Pages,
        blocks: torch.Tensor,
        num_tokens: torch.Tensor,
        key_out: torch.Tensor,
        value_out: torch.Tensor,
    ) -> None:
        """Writes the first tokens of n blocks in the model's dtype, 0 behind them; see the reference."""
        self._format.dequantize_blocks(pages.cache, blocks, num_tokens, key_out, value_out)

    def score_elements(self, shapes: Shapes) -> int:
        """Scratch memory that scoring needs on a GPU, in 4-byte elements."""
        return self._scorer.score_scratch(
            shapes.max_rows * shapes.num_kv_heads,
            shapes.num_heads // shapes.num_kv_heads,
            shapes.max_pages,
            self._layout.block.head_size,
            self._config.group_reduce,
            shapes.device,
        )

    def _kernels(self, kind: str, owner: KVFormat | PageScorer, device: str) -> Any:
        path = owner.kernels.get(device)
        if path is None and device == "cpu" and "reference" in owner.kernels:
            path = owner.kernels["reference"]
            self.references.append(kind)
        if path is None:
            raise ValueError(
                f"additional_config['quest']: {kind} {owner.name!r} has no kernels for {device}; it has: "
                f"{', '.join(owner.kernels)}"
            )
        return pkgutil.resolve_name(path)

    def _composed_store(self, device: str) -> Callable[..., None]:
        """In one pass where the scorer has one for this format, or reads what the format writes anyway."""
        kv_format, scorer = self._layout.format, self._layout.scorer
        if fused := getattr(self._scorer, "STORES", {}).get(kv_format.name):
            return lambda key, value, pages, slots: fused(key, value, pages.cache, pages.summary, slots)
        needed = {"format": (self._format, "store")}
        if kv_format.name not in scorer.borrows:
            needed["scorer"] = (self._scorer, "summarize")
        for kind, (module, name) in needed.items():
            if not hasattr(module, name):
                raise ValueError(
                    f"additional_config['quest']: scorer {scorer.name!r} has no store over format "
                    f"{kv_format.name!r} for {device}: the {kind} has no {name}"
                )
        if kv_format.name in scorer.borrows:
            return lambda key, value, pages, slots: self._format.store(key, value, pages.cache, slots)

        def store_and_summarize(
            key: torch.Tensor, value: torch.Tensor, pages: Pages, slot_mapping: torch.Tensor
        ) -> None:
            self._format.store(key, value, pages.cache, slot_mapping)
            self._scorer.summarize(key, pages.cache, pages.summary, slot_mapping)

        return store_and_summarize
