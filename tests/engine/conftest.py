"""Real engines on a real model, inside the test process so that a test can look into them."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tools.small_model import prepare_model

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

Engine = Callable[..., Any]


@pytest.fixture(scope="session")
def model() -> str:
    return str(prepare_model())


@pytest.fixture(scope="module")
def engine(model: str) -> Iterator[Engine]:
    """``engine(quest=None, **arguments)``: an `LLM`, dense without `quest`; one per distinct call."""
    from vllm import LLM

    started: dict[str, Any] = {}

    def start(quest: dict | None = None, **arguments: Any) -> Any:
        key = json.dumps([quest, arguments], sort_keys=True, default=str)
        if key not in started:
            settings: dict[str, Any] = {
                "model": model,
                "dtype": "float32",
                "enforce_eager": True,
                "max_model_len": 4096,
                "max_num_seqs": 8,
                "kv_cache_memory_bytes": 1 << 28,
                "distributed_executor_backend": "uni",
                "disable_log_stats": False,
                "attention_backend": "CPU_ATTN" if quest is None else "QUEST",
                "additional_config": {} if quest is None else {"quest": quest},
            }
            started[key] = LLM(**(settings | arguments))
        return started[key]

    yield start
    started.clear()
    gc.collect()


@pytest.fixture(scope="session")
def prose(model: str) -> list[int]:
    """Some 20,000 tokens of real text: the language reference that every Python ships."""
    import pydoc_data.topics

    from transformers import AutoTokenizer

    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    return AutoTokenizer.from_pretrained(model).encode(text[:80_000])
