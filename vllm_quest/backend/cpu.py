"""QUEST on CPU: vLLM's own CPU attention for dense rows, page selection for decode rows.

Dense rows run vLLM's kernel over the K and V part of the same pages, so that with a budget that covers the
context the outputs are those of ``CPU_ATTN``, bit for bit. It cannot read 4-bit pages: then it gets prefill
only, through a workspace, and all decode rows are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import ClassVar

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata, max_decode_query_len
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_quest.backend.base import QuestBackend, QuestImpl
from vllm_quest.backend.layers import LayerPlan
from vllm_quest.backend.rows import BatchRows, SparseRows, split_rows, token_indices
from vllm_quest.backend.workspace import Turn, Workspace, take_turns
from vllm_quest.config import QuestConfig
from vllm_quest.kernels import cpu as kernels
from vllm_quest.layout import PageLayout, PageViews
from vllm_quest.metrics import CounterFile


class QuestCPUBackend(QuestBackend, CPUAttentionBackend):
    """QUEST for CPU builds of vLLM."""

    @staticmethod
    def get_impl_cls() -> type[QuestCPUImpl]:
        """The class that attends."""
        return QuestCPUImpl

    @staticmethod
    def get_builder_cls() -> type[QuestCPUMetadataBuilder]:
        """The class that prepares a step."""
        return QuestCPUMetadataBuilder


@dataclass(frozen=True)
class DenseRows:
    """What one call of vLLM's kernel attends to.

    Attributes:
        tokens: The query tokens: a slice where they lie together, else ``[n]`` int64.
        metadata: vLLM's metadata of these tokens alone.
        turn: With 4-bit pages, what has to lie in the workspace; else None.
    """

    tokens: slice | torch.Tensor
    metadata: CPUAttentionMetadata
    turn: Turn | None = None


@dataclass(frozen=True)
class QuestCPUMetadata:
    """One step, for all layers of a KV group.

    Attributes:
        rows: How the batch is cut.
        whole: The whole batch as dense rows, for dense layers; None where no layer needs it, and with 4-bit
            pages, which dense layers cut as sparse ones do.
        dense: What is not `rows.sparse`.
    """

    rows: BatchRows
    whole: DenseRows | None
    dense: tuple[DenseRows, ...]


class QuestCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Decides once per engine which layers are sparse, and once per step which rows are."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        config = QuestConfig.from_vllm_config(vllm_config)
        self.layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        self.layout = PageLayout.of(kv_cache_spec, config, self.dtype, for_cpu=True)
        # Only these two of vLLM's CPU kernels keep K as plain [D, N]; AMX, for one, packs it.
        self.isa = "vec" if self.head_dim % 32 == 0 else "vec16"
        self._set_isa_to_layers(layer_names)
        self.max_query_len = max_decode_query_len(vllm_config)
        storage = next(iter(self.layers.values())).impl.storage
        self.workspace = None if storage is None else Workspace(storage, self.layout, self.num_kv_heads)
        counters = CounterFile()
        for layer in self.layers.values():
            layer.impl.counters, layer.impl.prefill_workspace = counters, self.workspace
        self.configure(config).log(config, self.layout, self.num_kv_heads)

    def configure(self, config: QuestConfig) -> LayerPlan:
        """Selects by `config` from the next step on; the cache must suit it: `QuestConfig.cache_fields`."""
        self.config = config
        plan = LayerPlan.of(self.layers, config)
        self.any_dense_layer = bool(plan.dense)
        # Dense configurations store bounds too; numba's first launch, which counts OpenMP's threads anew,
        # must not lie between vLLM's schedule and its attention.
        kernels.warm_up(
            self.layout, self.num_heads, self.num_kv_heads, config.group_reduce, config.value_threshold
        )
        for name, layer in self.layers.items():
            layer.impl.start(config, self.layout, plan.dense.get(name))
        return plan

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> QuestCPUMetadata:
        """Prepares one step; see the base class."""
        batch = common_attn_metadata
        rows = split_rows(batch, self.config, self.block_size, self.max_query_len)
        if self.workspace is not None:
            return QuestCPUMetadata(rows, None, self._through_workspace(batch, rows, self.workspace))
        whole = None
        if rows.sparse is None or self.any_dense_layer:
            whole = DenseRows(slice(None), super().build(common_prefix_len, batch, fast_build))
        if rows.sparse is None:
            return QuestCPUMetadata(rows, whole, (whole,) if whole else ())
        requests, lens, seq_lens = self._dense_requests(batch, rows)
        if len(requests) == 0:
            return QuestCPUMetadata(rows, whole, ())
        dense = self._part(batch, requests, lens, seq_lens, batch.block_table_tensor[requests])
        return QuestCPUMetadata(rows, whole, (dense,))

    def _through_workspace(
        self, batch: CommonAttentionMetadata, rows: BatchRows, workspace: Workspace
    ) -> tuple[DenseRows, ...]:
        """The prefilling requests, turn by turn."""
        requests, lens, seq_lens = self._dense_requests(batch, rows)
        turns = take_turns(
            requests, seq_lens, lens, batch.block_table_tensor, self.block_size, len(workspace.kv)
        )
        parts, first = [], 0
        for turn in turns:
            part = slice(first, first + len(turn.requests))
            parts.append(self._part(batch, turn.requests, lens[part], seq_lens[part], turn.block_table, turn))
            first = part.stop
        return tuple(parts)

    def _dense_requests(
        self, batch: CommonAttentionMetadata, rows: BatchRows
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The requests with tokens that are not sparse, how many those are, and the tokens that they see."""
        dense_lens = batch.query_start_loc_cpu.long().diff() - rows.sparse_lens
        requests = dense_lens.nonzero().flatten()
        return requests, dense_lens[requests], (batch.seq_lens.long() - rows.sparse_lens)[requests]

    def _part(
        self,
        batch: CommonAttentionMetadata,
        requests: torch.Tensor,
        lens: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        turn: Turn | None = None,
    ) -> DenseRows:
        """The first `lens` query tokens of `requests`."""
        tokens = token_indices(batch.query_start_loc_cpu.long()[requests], lens)
        first, last = int(tokens[0]), int(tokens[-1])
        part = batch.replace(
            query_start_loc=torch.nn.functional.pad(lens.cumsum(0), (1, 0)).int(),
            seq_lens=seq_lens.int(),
            num_reqs=len(requests),
            num_actual_tokens=len(tokens),
            max_query_len=int(lens.max()),
            block_table_tensor=block_table,
        )
        together = last - first + 1 == len(tokens)
        return DenseRows(slice(first, last + 1) if together else tokens, super().build(0, part), turn)


class QuestCPUImpl(QuestImpl, CPUAttentionBackendImpl):
    """Per layer and step: attend densely, or score, select and attend."""

    kernels: ClassVar[ModuleType] = kernels
    counters: CounterFile

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: QuestCPUMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attends; shapes as in the base class, but for `kv_cache`, which `PageLayout` describes."""
        if attn_metadata is None:  # vLLM's profiling run
            return output

        attend = partial(
            super().forward, layer, output_scale=output_scale, output_block_scale=output_block_scale
        )

        def attend_dense(dense: DenseRows) -> None:
            tokens = dense.tokens
            target = output[tokens]  # a view for a slice, a copy for indices
            cache = pages.kv
            if dense.turn is not None:
                cache = self.fill_workspace(layer, key[tokens], value[tokens], pages, dense.turn)
            attend(query[tokens], key, value, cache, dense.metadata, target)
            if isinstance(tokens, torch.Tensor):
                output[tokens] = target

        pages = self.pages(kv_cache)
        rows = attn_metadata.rows
        if self.dense_reason:
            rows.counts.add_dense_layer(self.counters, self.dense_reason)
        else:
            rows.counts.add_sparse_layer(self.counters, self.num_kv_heads, self.layout)
        if self.dense_reason and attn_metadata.whole is not None:
            attend_dense(attn_metadata.whole)
            return output
        for dense in attn_metadata.dense:
            attend_dense(dense)
        if rows.sparse is not None:
            output[rows.sparse.tokens] = self._attend_pages(query[rows.sparse.tokens], pages, rows.sparse)
        return output

    def _attend_pages(self, query: torch.Tensor, pages: PageViews, rows: SparseRows) -> torch.Tensor:
        """Score, select, attend, ``[R, Hq, D]``; in a dense layer attend to all pages."""
        config, kernels = self.config, self.kernels
        page_indices = None
        if not self.dense_reason:
            scores = kernels.score_pages(
                query, pages.bounds, rows.block_table, rows.num_pages, self.scale, config.group_reduce
            )
            page_indices = kernels.select_pages(
                scores, rows.num_pages, config.budget_pages, config.sink_pages, config.recent_pages
            )
        return kernels.attend_pages(
            query,
            pages.key,
            pages.value,
            rows.block_table,
            rows.seq_lens,
            page_indices,
            config.page_size,
            self.scale,
            min_context=config.sparse_context,
            value_threshold=config.value_threshold,
        )
