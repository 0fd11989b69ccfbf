"""FlexGen's 4-bit cache (arXiv 2303.06865, section 5), the baseline of the gate: K and V per token and head.

Only its values are simulated, in QUEST's pages in the model's dtype: what a request has stored is rounded to
the 16 values that FlexGen's format could hold. As with `kv_dtype: int4`, prompts without a stored context are
prefilled exactly.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from vllm_quest.accuracy.worker import MeasuredWorker

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

__all__ = ["FlexGenWorker", "rounded"]

GROUP = 64  # channels that share a zero point and a scale, at most
STEPS = 15


class FlexGenWorker(MeasuredWorker):
    """A worker whose decode rows see what FlexGen would have stored; CPUs, dense configurations."""

    def store_like_flexgen(self) -> None:
        """From now on, until the engine ends."""
        for layer in self.vllm_config.compilation_config.static_forward_context.values():
            layer.impl.forward = partial(_forward, layer.impl, layer.impl.forward)


def _forward(
    impl: Any,
    attend: Callable[..., torch.Tensor],
    layer: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    attn_metadata: Any,
    *rest: Any,
    **named: Any,
) -> torch.Tensor:
    if attn_metadata is not None:
        _round_contexts(impl.pages(kv_cache), attn_metadata.whole.metadata)
    return attend(layer, query, key, value, kv_cache, attn_metadata, *rest, **named)


def _round_contexts(pages: Any, metadata: Any) -> None:
    """Rounds K and V, in place, of every request that does not start in this step; twice is once."""
    block_size = pages.key.shape[2]
    new_lens = metadata.query_start_loc.diff()
    for table, seq_len, new in zip(metadata.block_table, metadata.seq_lens, new_lens, strict=False):
        if seq_len > new:
            blocks = table[: -(-int(seq_len) // block_size)].long()
            for cache in (pages.key, pages.value):
                cache[blocks] = rounded(cache[blocks])


def rounded(values: torch.Tensor) -> torch.Tensor:
    """``[..., D]`` of any float dtype: the nearest of 16 values between each group's extremes."""
    groups = values.unflatten(-1, (-1, min(GROUP, values.shape[-1]))).float()
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((high - low) / STEPS).clamp_min(1e-30)
    return (low + step * ((groups - low) / step).round()).flatten(-2).to(values.dtype)
