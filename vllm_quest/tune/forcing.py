"""Forced decoding: the engine decodes one by one the tokens that a request names.

vLLM still returns the log-probabilities that the model gave, from before any logits processor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from vllm_quest.tune.instrument import FORCED_TOKENS

__all__ = ["ForcedTokens"]


class ForcedTokens(AdapterLogitsProcessor):
    """Leaves only the wanted token where ``SamplingParams.extra_args`` has ``{"forced_tokens": [...]}``."""

    def is_argmax_invariant(self) -> bool:
        """It decides the argmax."""
        return False

    def new_req_logits_processor(
        self, params: SamplingParams
    ) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        """The request's own processor; None where it forces nothing."""
        wanted = (params.extra_args or {}).get(FORCED_TOKENS)
        if wanted is None:
            return None

        def force(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            if len(output_ids) >= len(wanted):
                return logits  # the request goes on by itself
            logits.fill_(-torch.inf)
            logits[wanted[len(output_ids)]] = 0
            return logits

        return force
