"""QUEST on CPU: vLLM's own CPU attention for dense rows, page selection for decode rows.

Dense rows run vLLM's kernel over the K and V part of the same pages, so that with a budget that covers the
context the outputs are those of ``CPU_ATTN``, bit for bit.
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
    """What vLLM's kernel attends to in a mixed batch.

    Attributes:
        tokens: The query tokens: a slice where they lie together, else ``[n]`` int64.
        metadata: vLLM's metadata of these tokens alone.
    """

    tokens: slice | torch.Tensor
    metadata: CPUAttentionMetadata


@dataclass(frozen=True)
class QuestCPUMetadata:
    """One step, for all layers of a KV group.

    Attributes:
        rows: How the batch is cut.
        whole: vLLM's metadata of the whole batch, for dense layers; None where no layer needs it.
        dense: The dense rest of the batch, for sparse layers; None where every row is sparse.
    """

    rows: BatchRows
    whole: CPUAttentionMetadata | None
    dense: DenseRows | None


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
        counters = CounterFile()
        for layer in self.layers.values():
            layer.impl.counters = counters
        self.configure(config).log(config, self.layout, self.dtype, self.num_kv_heads)

    def configure(self, config: QuestConfig) -> LayerPlan:
        """Selects by `config` from the next step on; the cache must suit it: `QuestConfig.cache_fields`."""
        self.config = config
        plan = LayerPlan.of(self.layers, config)
        self.any_dense_layer = bool(plan.dense)
        if plan.sparse:
            kernels.warm_up(
                self.layout,
                self.num_heads,
                self.num_kv_heads,
                config.group_reduce,
                config.value_threshold,
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
        needs_whole = rows.sparse is None or self.any_dense_layer
        return QuestCPUMetadata(
            rows=rows,
            whole=super().build(common_prefix_len, batch, fast_build) if needs_whole else None,
            dense=self._dense_rows(batch, rows) if rows.sparse else None,
        )

    def _dense_rows(self, batch: CommonAttentionMetadata, rows: BatchRows) -> DenseRows | None:
        """vLLM's metadata for the query tokens that are not sparse; None where all are."""
        starts = batch.query_start_loc_cpu.long()
        dense_lens = starts.diff() - rows.sparse_lens
        requests = dense_lens.nonzero().flatten()
        if len(requests) == 0:
            return None
        lens = dense_lens[requests]
        tokens = token_indices(starts[requests], lens)
        first, last = int(tokens[0]), int(tokens[-1])
        part = batch.replace(
            query_start_loc=torch.nn.functional.pad(lens.cumsum(0), (1, 0)).int(),
            seq_lens=(batch.seq_lens - rows.sparse_lens)[requests].int(),
            num_reqs=len(requests),
            num_actual_tokens=len(tokens),
            max_query_len=int(lens.max()),
            block_table_tensor=batch.block_table_tensor[requests],
        )
        together = last - first + 1 == len(tokens)
        return DenseRows(slice(first, last + 1) if together else tokens, super().build(0, part))


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

        def attend_dense(tokens: slice | torch.Tensor, metadata: CPUAttentionMetadata) -> None:
            target = output[tokens]  # a view for a slice, a copy for indices
            attend(query[tokens], key, value, pages.kv, metadata, target)
            if isinstance(tokens, torch.Tensor):
                output[tokens] = target

        pages = self.pages(kv_cache)
        rows = attn_metadata.rows
        if self.dense_reason:
            rows.counts.add_dense_layer(self.counters, self.dense_reason)
        else:
            vector_bytes = self.head_size * kv_cache.element_size()
            rows.counts.add_sparse_layer(self.counters, self.num_kv_heads, vector_bytes)
        if self.dense_reason or rows.sparse is None:
            assert attn_metadata.whole is not None
            attend_dense(slice(None), attn_metadata.whole)
            return output
        if attn_metadata.dense is not None:
            attend_dense(attn_metadata.dense.tokens, attn_metadata.dense.metadata)
        output[rows.sparse.tokens] = self._attend_sparse(query, pages, rows.sparse)
        return output

    def _attend_sparse(self, query: torch.Tensor, pages: PageViews, rows: SparseRows) -> torch.Tensor:
        """Score, select, attend: ``[R, Hq, D]``."""
        config, kernels = self.config, self.kernels
        query = query[rows.tokens]
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
            value_threshold=config.value_threshold,
        )
