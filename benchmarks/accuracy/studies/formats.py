"""4-bit caches that others have, next to ours in the gate: their values only, in the model's dtype.

Both quantize K and V per token and head, and differ in what they round and when:

- FlexGen (arXiv 2303.06865, section 5): groups of at most 64 channels, 16 values between their extremes. A
  context is rounded once it is stored, so prompts are prefilled exactly, as with `kv_dtype: int4`.
- vLLM's `int4_per_token_head`: all channels of a head, after a randomized Hadamard transform, with zero among
  the 16 values. Rounded as they are written: all attention, prefill's too, reads what the cache holds.
  `int4_per_token_head_exact_prompts` rounds when FlexGen does, to tell the format from its prefill.

Importing this registers them, for engines of this process on CPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from vllm_quest.formats import FORMATS
from vllm_quest.formats.auto import AutoCache, AutoFormat
from vllm_quest.formats.auto import cpu as exact

__all__ = ["SIMULATED", "flexgen", "int4_per_token_head"]

FLEXGEN_GROUP = 64
STEPS = 15


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


class RoundingKernels:
    """Those of the model's dtype, but for what is stored."""

    def __init__(self, rounded: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._rounded = rounded

    def store(
        self, key: torch.Tensor, value: torch.Tensor, cache: AutoCache, slot_mapping: torch.Tensor
    ) -> None:
        exact.store(self._rounded(key), self._rounded(value), cache, slot_mapping)

    def attend_pages(self, *arguments: Any, **named: Any) -> torch.Tensor:
        return exact.attend_pages(*arguments, **named)

    def dequantize_blocks(
        self,
        cache: AutoCache,
        blocks: torch.Tensor,
        num_tokens: torch.Tensor,
        key_out: torch.Tensor,
        value_out: torch.Tensor,
    ) -> None:
        wanted = (torch.arange(key_out.shape[2]) < num_tokens[:, None])[:, None, :, None]
        for stored, out in ((cache.key, key_out), (cache.value, value_out)):
            out[: len(blocks)] = torch.where(wanted, stored[blocks.long()], 0)


FLEXGEN = RoundingKernels(flexgen)
PER_TOKEN_HEAD = RoundingKernels(int4_per_token_head)


class FlexGen(AutoFormat):
    """Prompts are prefilled exactly: vLLM's dense kernels do not read the cache."""

    name: ClassVar[str] = "flexgen"
    is_dense: ClassVar[bool] = False
    kernels: ClassVar[Mapping[str, str]] = {"cpu": f"{__name__}:FLEXGEN"}


class Int4PerTokenHead(AutoFormat):
    """vLLM's dense kernels read the cache, in prefill too."""

    name: ClassVar[str] = "int4_per_token_head"
    kernels: ClassVar[Mapping[str, str]] = {"cpu": f"{__name__}:PER_TOKEN_HEAD"}


class Int4PerTokenHeadExactPrompts(Int4PerTokenHead):
    """The same values, prefilled as FlexGen's."""

    name: ClassVar[str] = "int4_per_token_head_exact_prompts"
    is_dense: ClassVar[bool] = False


SIMULATED = {one.name: one for one in (FlexGen, Int4PerTokenHead, Int4PerTokenHeadExactPrompts)}
FORMATS.update(SIMULATED)
