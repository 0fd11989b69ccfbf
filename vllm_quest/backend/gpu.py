"""QUEST on GPUs: vLLM's own dense backend for prefill, page selection for decode rows.

The dense backend cannot read 4-bit pages: then it gets prefill only, through a workspace, and dense layers
decode with our kernel, which reads all pages. The classes are mixed into those of vLLM's dense backends.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import ClassVar

import torch
from vllm.v1.attention.backend import AttentionLayer
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_quest.backend.base import QuestBackend, QuestImpl
from vllm_quest.backend.gpu_metadata import DecodeRows, PrefillRows, QuestGPUMetadata
from vllm_quest.kernels import triton as kernels
from vllm_quest.kernels.triton import Workspace
from vllm_quest.layout import PageViews

# What a block takes beside its pages, residuals above all, weighs less the longer it is: 4-bit blocks of 16
# tokens take 0.54 of bfloat16 where those of 128 take 0.32, and bounds that lie together are read faster.
PREFERRED_BLOCK_SIZE = 128


class QuestGPUBackend(QuestBackend):
    """What QUEST supports on a GPU; mixed into vLLM's dense backend."""

    forward_includes_kv_cache_update: ClassVar[bool] = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Up to 256 channels, in steps that keep every vector aligned to 16 bytes."""
        return 16 <= head_size <= 256 and head_size % 16 == 0

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Tokens per block where the user names none."""
        return max(PREFERRED_BLOCK_SIZE, super().get_preferred_block_size(default_block_size))  # type: ignore[misc]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """The tokens of one (block, KV head) must be one contiguous run."""
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)


class QuestGPUImpl(QuestImpl):
    """Per layer and step: vLLM's kernel for prefill; score, select and attend for decode."""

    kernels: ClassVar[ModuleType] = kernels
    workspace: Workspace

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: QuestGPUMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attends; shapes as in vLLM's class, but for `kv_cache`, which `PageLayout` describes."""
        if attn_metadata is None:  # vLLM's profiling run
            return output.fill_(0)
        attend = partial(
            super().forward,  # type: ignore[misc]
            layer,
            output_scale=output_scale,
            output_block_scale=output_block_scale,
        )

        def attend_dense(rows: PrefillRows) -> None:
            tokens, cache = rows.tokens, pages.kv
            if rows.turn is not None:
                cache = self.fill_workspace(layer, key[tokens], value[tokens], pages, rows.turn)
            attend(query[tokens], key[tokens], value[tokens], cache, rows.metadata, output[tokens])

        pages = self.pages(kv_cache)
        if self.dense_reason and attn_metadata.whole is not None:
            attend_dense(attn_metadata.whole)
            return output
        if attn_metadata.decode is not None:
            decode_tokens = len(attn_metadata.decode.seq_lens)
            self._attend_pages(query[:decode_tokens], pages, attn_metadata.decode, output[:decode_tokens])
        for rows in attn_metadata.prefill:
            attend_dense(rows)
        return output

    def _attend_pages(
        self, query: torch.Tensor, pages: PageViews, rows: DecodeRows, output: torch.Tensor
    ) -> None:
        """Score, select, attend: three launches; in a dense layer one, which attends to all pages."""
        page_indices = None if self.dense_reason else self._select_pages(query, pages, rows)
        self.kernels.attend_pages(
            query,
            pages.key,
            pages.value,
            rows.block_table,
            rows.seq_lens,
            page_indices,
            self.config.page_size,
            self.scale,
            min_context=self.config.sparse_context,
            value_threshold=self.config.value_threshold,
            out=output,
            workspace=self.workspace,
        )

    def _select_pages(self, query: torch.Tensor, pages: PageViews, rows: DecodeRows) -> torch.Tensor:
        config, workspace = self.config, self.workspace
        scores = self.kernels.score_pages(
            query,
            pages.bounds,
            rows.block_table,
            rows.num_pages,
            self.scale,
            config.group_reduce,
            workspace=workspace,
        )
        return self.kernels.select_pages(
            scores,
            rows.num_pages,
            config.budget_pages,
            config.sink_pages,
            config.recent_pages,
            workspace=workspace,
        )
