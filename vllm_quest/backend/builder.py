"""Prepares the steps of a KV group: which layers are sparse, once; which rows are, step by step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    max_decode_query_len,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_quest.backend.counting import StepCounts
from vllm_quest.backend.impl import KVGroup
from vllm_quest.backend.layers import LayerPlan
from vllm_quest.backend.prefill import PrefillBuffer, take_turns
from vllm_quest.backend.step import Cut, DecodeRows, DenseRows, Step, pages_to_score, part_of, row_owners
from vllm_quest.config import QuestConfig
from vllm_quest.kernels.operations import Operations, Shapes
from vllm_quest.metrics import CounterFile
from vllm_quest.page import PageLayout

__all__ = ["QuestMetadataBuilder"]

# Entries by which vLLM may round up the width of a block table: 128 tokens of the smallest block.
MAX_BLOCK_PADDING = 8


class QuestMetadataBuilder(AttentionMetadataBuilder):
    """What all devices share. A device says how it cuts a batch, and where its decode rows lie.

    Attributes:
        device_name: The kernels that run, a key of `kernels.operations.DEVICES`.
        for_cpu: K lies channel by channel.
        dense_builder: Prepares vLLM's own dense kernel.
    """

    device_name: ClassVar[str]
    for_cpu: ClassVar[bool]
    dense_builder: ClassVar[type[AttentionMetadataBuilder]]

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        config, dtype = QuestConfig.from_vllm_config(vllm_config), vllm_config.model_config.dtype
        self.spec = kv_cache_spec
        self.layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        self.layout = PageLayout.of(kv_cache_spec, config, dtype, for_cpu=self.for_cpu)
        # vLLM's kernels read K and V in the model's dtype. One builder for the whole batch and one for its
        # part: on GPUs each keeps the schedule of its last batch in a persistent buffer.
        dense_spec = replace(kv_cache_spec, dtype=dtype)
        self._whole_builder, self._part_builder = (
            self.dense_builder(dense_spec, layer_names, vllm_config, device) for _ in range(2)
        )
        storage = next(iter(self.layers.values())).impl.prefill_storage
        self.prefill = None
        if storage is not None:
            self.prefill = PrefillBuffer(storage, self.layout.block, kv_cache_spec.num_kv_heads)
        self.max_query_len = max_decode_query_len(vllm_config)
        graph_rows = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        self.max_rows = max(vllm_config.scheduler_config.max_num_seqs * self.max_query_len, graph_rows)
        max_blocks = kv_cache_spec.max_num_blocks_per_req(vllm_config, vllm_config.model_config.max_model_len)
        self.max_blocks = max_blocks + MAX_BLOCK_PADDING  # vLLM rounds the width of the block table up
        self._parameters = {
            name: self.layout.scorer.parameters(name, kv_cache_spec.num_kv_heads, device)
            for name in self.layers
        }
        self.counters = CounterFile()
        self.configure(config).log(config, self.layout, kv_cache_spec.num_kv_heads, self.operations)

    def configure(self, config: QuestConfig) -> LayerPlan:
        """Selects by `config` from the next step on; the cache must suit it: `QuestConfig.cache_fields`.

        A CUDA graph continues as it was captured: only eager engines can be configured again.
        """
        self.config = config
        self.plan = LayerPlan.of(self.layers, config)
        self.operations = Operations(
            self.layout,
            config,
            self.device_name,
            Shapes(
                num_heads=next(iter(self.layers.values())).num_heads,
                num_kv_heads=self.spec.num_kv_heads,
                max_rows=self.max_rows,
                max_pages=self.max_blocks * self.layout.block.pages,
                reads_everything=bool(self.plan.dense) and not self.layout.format.is_dense,
                device=self.device,
                parameters=next(iter(self._parameters.values())),
            ),
        )
        group = KVGroup(self.layout, self.operations, self.prefill)
        for name, layer in self.layers.items():
            is_dense = name in self.plan.dense
            layer.impl.start(group, is_dense=is_dense, parameters=self._parameters[name])
        return self.plan

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Step:
        """Prepares one step; see vLLM's base class."""
        return self._build(common_attn_metadata, fast_build, is_counted=True)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Step:
        """As `build`, for a step that nobody asked for."""
        return self._build(common_attn_metadata, fast_build=False, is_counted=False)

    @abstractmethod
    def cut(self, batch: CommonAttentionMetadata) -> Cut:
        """Says what decodes, and what of that our kernels attend to."""

    @abstractmethod
    def decode_rows(self, batch: CommonAttentionMetadata, cut: Cut) -> DecodeRows:
        """The rows of our kernels; there is at least one."""

    @abstractmethod
    def host_lens(self, batch: CommonAttentionMetadata) -> torch.Tensor | None:
        """``[requests]`` tokens that each request has; on the host, exact for those in their prompt."""

    def _build(self, batch: CommonAttentionMetadata, fast_build: bool, is_counted: bool) -> Step:
        cut = self.cut(batch)
        if is_counted and (counts := self.count(batch, cut)) is not None:
            for reason, layers in self.plan.dense_counts.items():
                counts.add_dense_layer(self.counters, reason, layers)
            counts.add_sparse_layer(self.counters, self.spec.num_kv_heads, self.layout, len(self.plan.sparse))
        has_rows = bool(cut.own_lens.any())
        whole = None
        if self.layout.format.is_dense and (self.plan.dense or not has_rows):
            whole = DenseRows(slice(None), self._whole_builder.build(0, batch, fast_build))
        if not has_rows and whole is not None:
            return Step(None, (whole,), whole)
        return Step(
            decode=self.decode_rows(batch, cut) if has_rows else None,
            dense=tuple(self._dense_rows(batch, cut, fast_build)),
            whole=whole,
        )

    def _dense_rows(self, batch: CommonAttentionMetadata, cut: Cut, fast_build: bool) -> Iterator[DenseRows]:
        """What is left for vLLM's kernel, in one part, or turn by turn through the prefill buffer."""
        dense_lens = (batch.query_start_loc_cpu.diff().long() - cut.own_lens).clamp(min=0)
        requests = dense_lens.nonzero().flatten()
        if len(requests) == 0:
            return
        if self.prefill is None:
            tokens, part = part_of(batch, requests, cut, None)
            yield DenseRows(tokens, self._part_builder.build(0, part, fast_build))
            return
        seq_lens = self.host_lens(batch)
        if seq_lens is None:
            seq_lens = batch.seq_lens.cpu()
        turns = list(
            take_turns(
                requests,
                (seq_lens.long() - cut.own_lens)[requests],
                dense_lens[requests],
                batch.block_table_tensor,
                self.layout.block.block_size,
                len(self.prefill.kv),
            )
        )
        for turn in turns:
            tokens, part = part_of(batch, turn.requests, cut, turn)
            # vLLM's builder may keep its schedule in one buffer, which the next turn would overwrite.
            metadata = self._part_builder.build(0, part, fast_build or len(turns) > 1)
            yield DenseRows(tokens, metadata, turn)

    def count(self, batch: CommonAttentionMetadata, cut: Cut) -> StepCounts | None:
        """Counts one step, on the host. None for a drafting model's, which come without lengths."""
        known = self.host_lens(batch)
        if known is None:
            return None
        request, after = row_owners(cut.decode_lens)
        lens = (known[request] - after).clamp(min=0)
        prefill_tokens = int(batch.query_start_loc_cpu[-1]) - len(request)
        return StepCounts.of(
            self.config,
            prefill_tokens=max(prefill_tokens, 0),
            decode_rows=int((lens > 0).sum()),
            sparse_lens=lens[pages_to_score(lens, self.config) > 0],
        )
