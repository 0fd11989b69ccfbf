"""QUEST on CUDA GPUs: prefill by vLLM's FlashAttention."""

from __future__ import annotations

from typing import ClassVar

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from vllm_quest.backend.gpu import QuestGPUBackend, QuestGPUMetadataBuilder
from vllm_quest.backend.impl import QuestImpl


class QuestCUDAImpl(QuestImpl, FlashAttentionImpl):
    """FlashAttention for prefill and dense layers, page selection for decode."""

    dense_impl: ClassVar[type] = FlashAttentionImpl


class QuestCUDAMetadataBuilder(QuestGPUMetadataBuilder):
    """As `QuestGPUMetadataBuilder`."""

    dense_builder: ClassVar[type] = FlashAttentionMetadataBuilder


class QuestCUDABackend(QuestGPUBackend, FlashAttentionBackend):
    """QUEST for CUDA builds of vLLM."""

    @staticmethod
    def get_impl_cls() -> type[QuestCUDAImpl]:
        """The class that attends."""
        return QuestCUDAImpl

    @staticmethod
    def get_builder_cls() -> type[QuestCUDAMetadataBuilder]:
        """The class that prepares a step."""
        return QuestCUDAMetadataBuilder
