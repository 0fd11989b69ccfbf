"""What the backends of all devices share: what they support, and where a layer's pages lie.

The classes here are mixed into vLLM's own backend of a device, which attends to the dense rows.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from vllm_quest.backend import workspace
from vllm_quest.backend.support import explain, refusal
from vllm_quest.config import QuestConfig, current_config
from vllm_quest.layout import PageLayout, PageViews
from vllm_quest.registration import BACKEND_NAME, INT4_CACHE_DTYPE

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionLayer
    from vllm.v1.kv_cache_interface import AttentionSpec


@classmethod  # type: ignore[misc]
def _no(cls: type) -> bool:
    return False


class QuestBackend:
    """What QUEST supports on any device; mixed into a subclass of vLLM's `AttentionBackend`."""

    supported_kv_cache_dtypes: ClassVar[list] = ["auto", INT4_CACHE_DTYPE]
    supports_kv_cache_update_bypass: ClassVar[bool] = False  # vLLM 0.33: K and V written past the bounds

    @staticmethod
    def get_name() -> str:
        """The name under which vLLM selects this backend."""
        return BACKEND_NAME

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Says what a KV block takes: K, V and the bounds of its pages."""
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
        return [explain(reason) for reason in super().validate_configuration(*args, **kwargs)]  # type: ignore[misc]


class QuestImpl:
    """The cache of one layer, and its update; mixed into a subclass of vLLM's `AttentionImpl`.

    Attributes:
        kernels: The four operations of this device.
        config: The engine's configuration.
        layout: The cut of this layer's blocks.
        dense_reason: Why this layer is dense, a key of `layers.DENSE_REASONS`; None for a sparse layer.
        storage: Memory of the workspace through which 4-bit pages are prefilled, the same for all layers;
            None where K and V are in the model's dtype.
        prefill_workspace: That workspace, set by the builder.
    """

    kernels: ClassVar[ModuleType]
    config: QuestConfig
    layout: PageLayout
    dense_reason: str | None
    storage: torch.Tensor | None
    prefill_workspace: workspace.Workspace | None
    scale: float  # vLLM's
    can_return_lse_for_decode: ClassVar[bool] = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        # vLLM's kernels never see the 4-bit pages: what they read is in the model's dtype.
        dense_dtype = "auto" if kv_cache_dtype == INT4_CACHE_DTYPE else kv_cache_dtype
        super().__init__(  # type: ignore[call-arg]
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            dense_dtype,
            *args,
            **kwargs,
        )
        self.supports_dcp = self.supports_quant_query_input = False
        # Remembered for customize_spec, which vLLM calls outside its configuration context.
        is_int4 = current_config().kv_dtype == "int4"
        unsupported = {
            "ALiBi": getattr(self, "alibi_slopes", None) is not None,
            "logits soft cap": bool(getattr(self, "logits_soft_cap", None)),
            "attention sinks": getattr(self, "sinks", None) is not None,
            "sliding windows with kv_dtype=int4": is_int4 and sliding_window is not None,
        }
        if any(unsupported.values()):
            raise refusal([explain(feature) for feature, used in unsupported.items() if used])
        self._views: tuple[int, PageViews] | None = None
        self.storage = workspace.allocate(num_kv_heads, head_size) if is_int4 else None

    def _fuses_nothing(self, *unused: object) -> bool:
        return False

    # Each fusion would write K and V, or scale the output, without us.
    fused_output_quant_supported = _fuses_nothing
    fused_rope_kvcache_supported = _fuses_nothing
    fused_qk_norm_rope_kvcache_supported = _fuses_nothing
    fused_qk_norm_mrope_kvcache_supported = _fuses_nothing

    def start(self, config: QuestConfig, layout: PageLayout, dense_reason: str | None) -> None:
        """Called by the builder, which owns these decisions; see the attributes."""
        self.config, self.layout, self.dense_reason = config, layout, dense_reason

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Stores K, V and the bounds of the touched pages, also in a dense layer; see vLLM's base class."""
        pages = self.pages(kv_cache)
        self.kernels.store(key, value, pages.key, pages.value, pages.bounds, slot_mapping)

    def fill_workspace(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        pages: PageViews,
        turn: workspace.Turn,
    ) -> torch.Tensor:
        """The cache of one turn: its requests' stored context, and their new tokens as they are."""
        assert self.prefill_workspace is not None
        cache = self.prefill_workspace.load(self.kernels.dequantize_blocks, pages, turn)
        super().do_kv_cache_update(layer, key, value, cache, turn.slots)  # type: ignore[misc]
        return cache

    def pages(self, kv_cache: torch.Tensor) -> PageViews:
        """The views into this layer's cache, which vLLM binds once."""
        if self._views is None or self._views[0] != kv_cache.data_ptr():
            self._views = (kv_cache.data_ptr(), self.layout.views(kv_cache))
        return self._views[1]
