"""4-bit caches that others have, beside ours in the gate: their values only, in QUEST's pages.

Both quantize K and V per token and head, and differ in what they round and when:

- FlexGen (arXiv 2303.06865, section 5): groups of at most 64 channels, 16 values between their extremes. A
  context is rounded once it is stored, so prompts are prefilled exactly, as with `kv_dtype: int4`.
- vLLM's `int4_per_token_head`: all channels of a head, after a randomized Hadamard transform, with zero among
  the 16 values. Rounded as they are written: all attention, prefill's too, reads what the cache holds.
  `int4_per_token_head_exact_prompts` rounds when FlexGen does, to tell the format from its prefill.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from vllm_quest.tune.worker import MeasuredWorker

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    Rounding = Callable[[torch.Tensor], torch.Tensor]

__all__ = ["FORMATS", "FormatWorker", "flexgen", "int4_per_token_head"]

FLEXGEN_GROUP = 64
STEPS = 15


class FormatWorker(MeasuredWorker):
    """A worker whose requests see what another format would have stored; CPUs, dense configurations."""

    def store_like(self, name: str) -> None:
        """One of `FORMATS`, from now on, until the engine ends."""
        for layer in self.vllm_config.compilation_config.static_forward_context.values():
            FORMATS[name](layer.impl)


def flexgen(values: torch.Tensor) -> torch.Tensor:
    """``[..., D]`` of any float dtype: the nearest of 16 values between each group's extremes."""
    groups = values.unflatten(-1, (-1, min(FLEXGEN_GROUP, values.shape[-1]))).float()
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((high - low) / STEPS).clamp_min(1e-30)
    return (low + step * ((groups - low) / step).round()).flatten(-2).to(values.dtype)


def int4_per_token_head(values: torch.Tensor) -> torch.Tensor:
    """``[..., D]`` of any float dtype: what vLLM's cache holds of it, rotated back.

    The rotation is vLLM's own function; the rounding is that of its kernel, but for the four lowest bits of a
    scale, where that keeps the zero point.
    """
    from vllm.utils.math_utils import largest_power_of_2_divisor
    from vllm.v1.attention.ops.int4_per_token_head import single_rht

    rotated = single_rht(values.float()).to(values.dtype).float()
    low, high = rotated.aminmax(dim=-1, keepdim=True)
    step = ((high - low) / STEPS).clamp_min(1e-6)
    zero = _half_up(-low / step).clamp(0, STEPS)
    codes = _half_up(rotated * (1 / step) + zero).clamp(0, STEPS)
    stored = single_rht((codes - zero) * step, inverse=True) / largest_power_of_2_divisor(values.shape[-1])
    return stored.to(values.dtype)


def _half_up(numbers: torch.Tensor) -> torch.Tensor:
    return (numbers + 0.5).floor()


def _round_stored_contexts(rounded: Rounding, impl: Any) -> None:
    attend = impl.forward

    def forward(
        layer: Any,
        query: Any,
        key: Any,
        value: Any,
        kv_cache: Any,
        attn_metadata: Any,
        *rest: Any,
        **named: Any,
    ) -> torch.Tensor:
        if attn_metadata is not None:
            _round_contexts(rounded, impl.pages(kv_cache), attn_metadata.whole.metadata)
        return attend(layer, query, key, value, kv_cache, attn_metadata, *rest, **named)

    impl.forward = forward


def _round_contexts(rounded: Rounding, pages: Any, metadata: Any) -> None:
    """Rounds K and V, in place, of every request that does not start in this step; twice is once."""
    block_size = pages.key.shape[2]
    new_lens = metadata.query_start_loc.diff()
    for table, seq_len, new in zip(metadata.block_table, metadata.seq_lens, new_lens, strict=False):
        if seq_len > new:
            blocks = table[: -(-int(seq_len) // block_size)].long()
            for cache in (pages.key, pages.value):
                cache[blocks] = rounded(cache[blocks])


def _round_written_tokens(rounded: Rounding, impl: Any) -> None:
    store = impl.do_kv_cache_update

    def do_kv_cache_update(layer: Any, key: Any, value: Any, kv_cache: Any, slot_mapping: Any) -> None:
        store(layer, rounded(key), rounded(value), kv_cache, slot_mapping)

    impl.do_kv_cache_update = do_kv_cache_update


FORMATS: dict[str, Callable[[Any], None]] = {
    "flexgen": partial(_round_stored_contexts, flexgen),
    "int4_per_token_head": partial(_round_written_tokens, int4_per_token_head),
    "int4_per_token_head_exact_prompts": partial(_round_stored_contexts, int4_per_token_head),
}
