"""QUEST on GPUs: vLLM's own dense backend for prefill, page selection for decode rows.

The batch comes with the decoding requests first. All their rows run the same kernels, which know by the
length of a row whether it selects pages or reads all of them. Nothing here asks the GPU for a length, and
what a decode step uses lies in buffers that stay where they are: a CUDA graph can hold the step.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from vllm_quest.backend.backend import QuestBackend
from vllm_quest.backend.builder import QuestMetadataBuilder
from vllm_quest.backend.layers import LayerPlan
from vllm_quest.backend.step import Cut, DecodeRows, pages_to_score, row_owners
from vllm_quest.config import QuestConfig, QuestConfigError

# What a block takes beside its pages, residuals above all, weighs less the longer it is: 4-bit blocks of 16
# tokens take 0.54 of bfloat16 where those of 128 take 0.32, and bounds that lie together are read faster.
PREFERRED_BLOCK_SIZE = 128


class QuestGPUMetadataBuilder(QuestMetadataBuilder):
    """As `QuestMetadataBuilder`, with persistent rows; a device names its dense builder."""

    device_name: ClassVar[str] = "triton"
    for_cpu: ClassVar[bool] = False
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    supports_update_block_table: ClassVar[bool] = False
    supports_draft_decode_metadata_update: ClassVar[bool] = False

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self.row_lens = torch.zeros(self.max_rows, dtype=torch.int32, device=device)
        self.row_pages = torch.zeros(self.max_rows, dtype=torch.int32, device=device)
        self.row_blocks: torch.Tensor | None = None  # of rows that are not requests: speculation

    def configure(self, config: QuestConfig) -> LayerPlan:
        """As in the base class."""
        if config.decode_tail:
            raise QuestConfigError(
                "decode_tail", f"{config.decode_tail}", "0 on a GPU, where only the batch's first rows decode"
            )
        return super().configure(config)

    def cut(self, batch: CommonAttentionMetadata) -> Cut:
        """As vLLM has reordered the batch; a prompt's last chunk of one token counts as decode."""
        decodes, _, decode_tokens, _ = split_decodes_and_prefills(batch, self.reorder_batch_threshold)
        lens = torch.zeros(batch.num_reqs, dtype=torch.int64)
        lens[:decodes] = batch.query_start_loc_cpu[: decodes + 1].diff()
        if int(lens.sum()) < decode_tokens:  # a CUDA graph's padding: requests of no length
            lens[:decodes] = decode_tokens // decodes
        return Cut(lens, lens)

    def decode_rows(self, batch: CommonAttentionMetadata, cut: Cut) -> DecodeRows:
        """The first tokens of the batch, in persistent buffers."""
        request, after = row_owners(cut.own_lens)
        rows = len(request)
        seq_lens, block_table = batch.seq_lens[:rows], batch.block_table_tensor[:rows]
        if int(after.max()):
            request, after = request.to(seq_lens.device), after.to(seq_lens.device)
            if self.row_blocks is None:
                self.row_blocks = block_table.new_zeros(self.max_rows, block_table.shape[1])
            torch.index_select(batch.block_table_tensor, 0, request, out=self.row_blocks[:rows])
            block_table = self.row_blocks[:rows]
            seq_lens = (batch.seq_lens[request] - after).clamp(min=0).int()
        self.row_lens[:rows] = seq_lens
        self.row_pages[:rows] = pages_to_score(seq_lens, self.config)
        return DecodeRows(block_table, self.row_lens[:rows], self.row_pages[:rows], tokens=slice(0, rows))

    def host_lens(self, batch: CommonAttentionMetadata) -> torch.Tensor | None:
        """vLLM's upper bounds, exact but for asynchronous drafts; none in the steps of a drafting model."""
        return batch.seq_lens_cpu_upper_bound


class QuestGPUBackend(QuestBackend):
    """What QUEST supports on a GPU; a device mixes it with its dense backend."""

    forward_includes_kv_cache_update: ClassVar[bool] = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Up to 256 channels, in steps that keep every vector aligned to 16 bytes."""
        return 16 <= head_size <= 256 and head_size % 16 == 0

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Tokens per block where the user names none."""
        return max(PREFERRED_BLOCK_SIZE, super().get_preferred_block_size(default_block_size))

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """The tokens of one (block, KV head) must be one contiguous run."""
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)
