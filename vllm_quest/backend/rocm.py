"""QUEST on ROCm GPUs: prefill by vLLM's Triton attention."""

from __future__ import annotations

from typing import ClassVar

from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from vllm_quest.backend.gpu import QuestGPUBackend, QuestGPUMetadataBuilder
from vllm_quest.backend.impl import QuestImpl


class QuestROCmImpl(QuestImpl, TritonAttentionImpl):
    """Triton attention for prefill and dense layers, page selection for decode."""

    dense_impl: ClassVar[type] = TritonAttentionImpl


class QuestROCmMetadataBuilder(QuestGPUMetadataBuilder):
    """As `QuestGPUMetadataBuilder`."""

    dense_builder: ClassVar[type] = TritonAttentionMetadataBuilder


class QuestROCmBackend(QuestGPUBackend, TritonAttentionBackend):
    """QUEST for ROCm builds of vLLM."""

    @staticmethod
    def get_impl_cls() -> type[QuestROCmImpl]:
        """The class that attends."""
        return QuestROCmImpl

    @staticmethod
    def get_builder_cls() -> type[QuestROCmMetadataBuilder]:
        """The class that prepares a step."""
        return QuestROCmMetadataBuilder
