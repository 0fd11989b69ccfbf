"""What QUEST does not run, said in full."""

from __future__ import annotations

# Part of vLLM's wording, lower case, and why; the first that fits counts.
_WHY = (
    ("mla not", "MLA keeps one latent vector per token, not K per head; page bounds do not apply"),
    ("encoder_decoder", "cross-attention caches are not decoded into"),
    ("encoder", "encoder attention has no KV cache to decode from"),
    ("kv_cache_dtype", "--kv-cache-dtype must be auto: K, V and bounds share the model's dtype"),
    ("attention sinks", "a logit without a key is not part of the page bound"),
)


def explain(reason: str) -> str:
    """`reason` as vLLM words it, with ours behind it where there is more to say."""
    text = reason if reason.endswith("not supported") else f"{reason} not supported"
    why = next((why for part, why in _WHY if part in text.lower()), None)
    return f"{text} ({why})" if why else text


def refusal(reasons: list[str]) -> ValueError:
    """The one error for a model that QUEST does not run."""
    return ValueError(f"--attention-backend QUEST cannot run this model: {'; '.join(reasons)}")
