"""One attention layer: store, and attend densely, or score, select and attend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionImpl

from vllm_quest.backend import prefill
from vllm_quest.backend.prefill import PrefillBuffer
from vllm_quest.backend.step import DecodeRows, DenseRows, Step
from vllm_quest.backend.support import explain, refusal
from vllm_quest.config import current_config
from vllm_quest.kernels.operations import Operations
from vllm_quest.page import PageLayout, Pages
from vllm_quest.registration import INT4_CACHE_DTYPE

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionLayer

__all__ = ["KVGroup", "QuestImpl"]


@dataclass(frozen=True)
class KVGroup:
    """What the layers of a KV group share.

    Attributes:
        layout: The cut of their blocks.
        operations: What they do with their pages.
        prefill: The buffer for prefill; None where vLLM's dense kernel reads the cache itself.
    """

    layout: PageLayout
    operations: Operations
    prefill: PrefillBuffer | None


class QuestImpl(AttentionImpl):
    """What all devices share. A device mixes it with the impl of its dense kernel, and names that.

    Attributes:
        dense_impl: vLLM's own class, which attends to dense rows over K and V in the model's dtype.
        prefill_storage: Memory of the buffer through which pages are prefilled that vLLM's dense kernel
            cannot read, the same for all layers; None where it can.
    """

    dense_impl: ClassVar[type[AttentionImpl]]
    can_return_lse_for_decode: ClassVar[bool] = False
    scale: float  # vLLM's

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
        # vLLM's kernels never see pages of ours: what they read is in the model's dtype.
        dense_dtype = "auto" if kv_cache_dtype == INT4_CACHE_DTYPE else kv_cache_dtype
        self.dense_impl.__init__(
            self,
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
        config = current_config()
        unsupported = {
            "ALiBi": getattr(self, "alibi_slopes", None) is not None,
            "logits soft cap": bool(getattr(self, "logits_soft_cap", None)),
            "attention sinks": getattr(self, "sinks", None) is not None,
            f"sliding windows with kv_dtype={config.kv_dtype}": (
                not config.format.is_dense and sliding_window is not None
            ),
        }
        if any(unsupported.values()):
            raise refusal([explain(feature) for feature, used in unsupported.items() if used])
        self.prefill_storage = None if config.format.is_dense else prefill.allocate(num_kv_heads, head_size)
        self._views: tuple[int, Pages] | None = None

    def _fuses_nothing(self, *unused: object) -> bool:
        return False

    # Each fusion would write K and V, or scale the output, without us.
    fused_output_quant_supported = _fuses_nothing
    fused_rope_kvcache_supported = _fuses_nothing
    fused_qk_norm_rope_kvcache_supported = _fuses_nothing
    fused_qk_norm_mrope_kvcache_supported = _fuses_nothing

    def start(self, group: KVGroup, *, is_dense: bool, parameters: Any) -> None:
        """Called by the builder, which decides what the layer shares, and whether it is dense.

        `parameters` are the scorer's, of this layer.
        """
        self._group, self._is_dense, self._parameters = group, is_dense, parameters

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Stores K, V and the summary of the touched pages, also in a dense layer; see vLLM's base class."""
        self._group.operations.store(key, value, self.pages(kv_cache), slot_mapping)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Step | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attends; shapes as in vLLM's class, but for `kv_cache`, which `PageLayout` describes."""
        step = attn_metadata
        if step is None:  # vLLM's profiling run
            return output.fill_(0)
        pages = self.pages(kv_cache)
        if self._is_dense and step.whole is not None:
            self._attend_densely(layer, query, key, value, pages, step.whole, output)
            return output
        if step.decode is not None:
            self._attend_to_pages(query, pages, step.decode, output)
        for rows in step.dense:
            self._attend_densely(layer, query, key, value, pages, rows, output)
        return output

    def _attend_to_pages(
        self, query: torch.Tensor, pages: Pages, rows: DecodeRows, output: torch.Tensor
    ) -> None:
        """Decode rows: score, select, attend; in a dense layer attend to all pages."""
        operations, page_indices = self._group.operations, None
        together = isinstance(rows.tokens, slice)
        query = query[rows.tokens]
        if not self._is_dense:
            scores = operations.score_pages(query, pages, rows, self.scale)
            page_indices = operations.select_pages(scores, rows)
        out = output[rows.tokens] if together else None
        out = operations.attend_pages(query, pages, rows, page_indices, self.scale, out)
        if not together:
            output[rows.tokens] = out

    def _attend_densely(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pages: Pages,
        rows: DenseRows,
        output: torch.Tensor,
    ) -> None:
        """Prefill, and what else vLLM's kernel attends to."""
        tokens, cache = rows.tokens, pages.kv
        query, key, value, out = query[tokens], key[tokens], value[tokens], output[tokens]
        if rows.turn is not None and self._group.prefill is not None:
            cache = self._group.prefill.load(self._group.operations, pages, rows.turn)
            self.dense_impl.do_kv_cache_update(self, layer, key, value, cache, rows.turn.slots)
        self.dense_impl.forward(self, layer, query, key, value, cache, rows.metadata, out)
        if isinstance(tokens, torch.Tensor):
            output[tokens] = out

    def pages(self, kv_cache: torch.Tensor) -> Pages:
        """The views into this layer's cache, which vLLM binds once."""
        if self._views is None or self._views[0] != kv_cache.data_ptr():
            self._views = (kv_cache.data_ptr(), self._group.layout.views(kv_cache, self._parameters))
        return self._views[1]
