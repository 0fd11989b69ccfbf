"""QUEST on CPU: vLLM's own CPU attention for dense rows, page selection for decode rows.

Dense rows run vLLM's kernel over the K and V part of the same pages, so that with a budget that covers the
context the outputs are those of ``CPU_ATTN``, bit for bit. Where it cannot read the pages it gets prefill
only, through a buffer, and all decode rows are ours.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_quest.backend.backend import QuestBackend
from vllm_quest.backend.builder import QuestMetadataBuilder
from vllm_quest.backend.impl import QuestImpl
from vllm_quest.backend.step import Cut, DecodeRows, joined, pages_to_score, row_owners


class PlainOrderBuilder(CPUAttentionMetadataBuilder):
    """vLLM's, for its kernels that keep K as plain [D, N]; AMX, for one, packs it."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.isa = "vec" if self.head_dim % 32 == 0 else "vec16"
        self._set_isa_to_layers(layer_names)


class QuestCPUMetadataBuilder(QuestMetadataBuilder):
    """As `QuestMetadataBuilder`. Any tokens of a batch may be decode rows; nothing is persistent."""

    device_name: ClassVar[str] = "cpu"
    for_cpu: ClassVar[bool] = True
    dense_builder: ClassVar[type] = PlainOrderBuilder

    def cut(self, batch: CommonAttentionMetadata) -> Cut:
        """A prompt's last chunk is prefill however short it is, so that outputs do not depend on chunking.

        Only `decode_tail` makes the end of a prompt decode too; then every prompt comes in one step.
        """
        query_lens = batch.query_start_loc_cpu.long().diff()
        decodes = query_lens <= self.max_query_len
        if batch.is_prefilling is not None:
            decodes &= ~batch.is_prefilling
        decode_lens = query_lens.where(decodes, query_lens.clamp(max=self.config.decode_tail))
        if batch.causal is not True:
            return Cut(decode_lens, torch.zeros_like(decode_lens))
        # Each token of a request sees one more than the token before it.
        shortest = self.config.sparse_context if self.layout.format.is_dense else 1
        beyond = (batch.seq_lens.long() - shortest + 1).clamp(min=0)
        return Cut(decode_lens, beyond.minimum(decode_lens))

    def decode_rows(self, batch: CommonAttentionMetadata, cut: Cut) -> DecodeRows:
        """Their block table is trimmed to the longest context."""
        request, after = row_owners(cut.own_lens)
        seq_lens = batch.seq_lens.long()[request] - after
        blocks = -(-int(seq_lens.max()) // self.layout.block.block_size)
        return DecodeRows(
            tokens=joined(batch.query_start_loc_cpu.long()[request + 1] - 1 - after),
            block_table=batch.block_table_tensor[request, :blocks],
            seq_lens=seq_lens.int(),
            num_pages=pages_to_score(seq_lens, self.config),
        )

    def host_lens(self, batch: CommonAttentionMetadata) -> torch.Tensor:
        """They are on the host."""
        return batch.seq_lens


class QuestCPUImpl(QuestImpl, CPUAttentionBackendImpl):
    """As `QuestImpl`."""

    dense_impl: ClassVar[type] = CPUAttentionBackendImpl


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
