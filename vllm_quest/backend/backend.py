"""What QUEST supports on any device."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.v1.attention.backend import AttentionBackend

from vllm_quest.backend.support import explain
from vllm_quest.config import current_config
from vllm_quest.page import PageLayout
from vllm_quest.registration import BACKEND_NAME, INT4_CACHE_DTYPE

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import AttentionSpec

__all__ = ["QuestBackend"]


@classmethod  # type: ignore[misc]
def _no(cls: type) -> bool:
    return False


class QuestBackend(AttentionBackend):
    """What all devices share. A device mixes it with the backend of its dense kernel."""

    supported_kv_cache_dtypes: ClassVar[list] = ["auto", INT4_CACHE_DTYPE]
    supports_kv_cache_update_bypass: ClassVar[bool] = False  # vLLM 0.33: K and V written past the bounds

    @staticmethod
    def get_name() -> str:
        """The name under which vLLM selects this backend."""
        return BACKEND_NAME

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Says what a KV block takes: K, V and what the scorer keeps of its pages."""
        if spec.state_content_bytes is not None:
            return spec
        layout = PageLayout.of(spec, current_config(), spec.dtype, for_cpu=False)
        return replace(spec, dtype=layout.cache_dtype, state_content_bytes=layout.content_bytes)

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoder self-attention only."""
        return attn_type == "decoder"

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        """The model's dtype, or ours of 4 bits."""
        return kv_cache_dtype is None or kv_cache_dtype in cls.supported_kv_cache_dtypes

    # vLLM's dense backends answer some of these with yes. Each would have another context than the request's
    # own tokens in order, a part of it, or a logit without a key: nothing that page bounds speak of. The
    # mismatch is of query lengths that only the GPU knows: rows are cut by those of the host.
    supports_non_causal = _no
    supports_sink = _no
    supports_rswa = _no
    supports_mm_prefix = _no
    supports_dcp = _no
    supports_pcp = _no
    supports_batch_invariance = _no
    supports_per_head_quant_scales = _no
    supports_device_cpu_query_lens_mismatch = _no

    @classmethod
    def validate_configuration(cls, *args: Any, **kwargs: Any) -> list[str]:
        """Why this backend cannot run a layer; empty where it can."""
        return [explain(reason) for reason in super().validate_configuration(*args, **kwargs)]
