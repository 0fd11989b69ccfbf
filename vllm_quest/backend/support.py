"""What QUEST does not run, said in full."""

from __future__ import annotations

_WHY = {
    "MLA not supported": "MLA keeps one latent vector per token, not K per head; page bounds do not apply",
    "attention type encoder not supported": "encoder attention has no KV cache to decode from",
    "attention type encoder_only not supported": "encoder-only attention has no KV cache to decode from",
    "attention type encoder_decoder not supported": "cross-attention caches are not decoded into",
    "kv_cache_dtype not supported": "--kv-cache-dtype must be auto: K, V and bounds share the model's dtype",
    "attention sinks not supported": "attention sinks (a logit without a key) are not part of the page bound",
}


def explain(reason: str) -> str:
    """`reason` as vLLM words it, with ours behind it where there is more to say."""
    text = reason if reason.endswith("not supported") else f"{reason} not supported"
    return f"{text} ({_WHY[text]})" if text in _WHY else text


def refusal(reasons: list[str]) -> ValueError:
    """The one error for a model that QUEST does not run."""
    return ValueError(f"--attention-backend QUEST cannot run this model: {'; '.join(reasons)}")
