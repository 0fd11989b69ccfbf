"""The backends that a benchmark compares: vLLM's dense ones by name, QUEST by configuration."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from vllm_quest.config import QuestConfig


@dataclass(frozen=True)
class Contender:
    """An attention backend with its settings.

    Attributes:
        name: What tables call it.
        backend: What ``attention_backend`` is set to.
        engine_args: What vLLM is started with, `backend` included.
        quest: None for a dense backend.
    """

    name: str
    backend: str
    engine_args: dict[str, Any]
    quest: QuestConfig | None = None


def dense(name: str) -> Contender:
    """``BACKEND`` or ``BACKEND:KV_CACHE_DTYPE``, as vLLM knows them."""
    backend, _, kv_cache_dtype = name.partition(":")
    engine_args = {"attention_backend": backend}
    if kv_cache_dtype:
        engine_args["kv_cache_dtype"] = kv_cache_dtype
    return Contender(name, backend, engine_args)


def quest(entries: dict[str, Any], token_budget: int) -> Contender:
    """QUEST with `entries` of its configuration.

    Raises:
        QuestConfigError: As `QuestConfig.from_dict`.
    """
    config = QuestConfig.from_dict({"token_budget": token_budget} | entries)
    settings = {
        field.name: value
        for field in fields(config)
        if field.name != "token_budget" and (value := getattr(config, field.name)) != field.default
    }
    name = " ".join([f"QUEST {config.token_budget}", *(f"{key}={value}" for key, value in settings.items())])
    engine_args = {"attention_backend": "QUEST", "additional_config": {"quest": asdict(config)}}
    return Contender(name, "QUEST", engine_args, config)


def dense_defaults() -> list[str]:
    """The dense backends worth comparing with on this machine; the first is the one vLLM would choose."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return ["CPU_ATTN"]
    return ["FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "TRITON_ATTN:int4_per_token_head",
            "TURBOQUANT:turboquant_4bit_nc"]  # fmt: skip
