"""An engine with one backend: its answers, and what decoding costs."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from typing import Any

KV_CACHE_BYTES = 1 << 30
ANSWER_TOKENS = 32
TIMED_STEPS = 32


@dataclass(frozen=True)
class Answer:
    """A greedy answer."""

    text: str
    token_ids: tuple[int, ...]


@dataclass
class EngineRun:
    """What one engine did.

    Attributes:
        kv_bytes_per_token: KV memory that one token of context takes.
        block_size: Tokens per block that vLLM allocates.
        head_size: Channels per head.
        answers: One per question asked.
        prompt_tokens: Tokens of each prompt.
        tokens_per_s: Decode speed of each repeat, batch 1, prefill not included.
        attention_ms: Decode attention per step of each repeat, all layers; empty where CUDA graphs hide it.
        counters: QUEST's counters; all zero for a dense backend.
    """

    kv_bytes_per_token: float
    block_size: int
    head_size: int
    answers: list[Answer] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)
    attention_ms: list[float] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)


class Engine:
    """A running engine that collects its figures in `run`."""

    def __init__(self, **engine_args: Any) -> None:
        """Starts vLLM's `LLM` with `engine_args`."""
        from vllm import LLM
        from vllm.platforms import current_platform

        self.eager = current_platform.is_cpu()  # on GPUs CUDA graphs, as users run it
        defaults = {
            "dtype": "float32" if current_platform.is_cpu() else "auto",
            "enforce_eager": self.eager,
            "kv_cache_memory_bytes": KV_CACHE_BYTES,
            "gpu_memory_utilization": 0.4,  # what must be free: room for two engines
            "enable_prefix_caching": True,
            "disable_log_stats": False,  # fills in RequestOutput.metrics
            "use_tqdm_on_load": False,
            "worker_extension_cls": "benchmarks.attention_timer.AttentionTimer",
        }
        self.llm = LLM(**(defaults | engine_args))
        config = self.llm.llm_engine.vllm_config
        self.run = EngineRun(
            kv_bytes_per_token=sum(self.llm.collective_rpc("kv_bytes_per_token")),
            block_size=config.cache_config.block_size,
            head_size=config.model_config.get_head_size(),
        )

    def ask(self, prompt: str) -> None:
        """Answers `prompt` greedily, one paragraph."""
        output = self._generate(prompt, max_tokens=ANSWER_TOKENS, stop=["\n\n"])
        self.run.answers.append(Answer(output.outputs[0].text, tuple(output.outputs[0].token_ids)))
        self.run.prompt_tokens.append(len(output.prompt_token_ids))

    def time_decoding(self, prompt: str) -> None:
        """Decode tokens/s without a timer inside the engine, then attention per step with one.

        vLLM stamps the first and the last token of a request: what lies between is decoding, nothing else.
        """
        metrics = self._generate(prompt, max_tokens=TIMED_STEPS + 1, ignore_eos=True).metrics
        self.run.tokens_per_s.append(TIMED_STEPS / (metrics.last_token_ts - metrics.first_token_ts))
        if self.eager:
            self.llm.collective_rpc("start_attention_timer")
            self._generate(prompt, max_tokens=TIMED_STEPS + 1, ignore_eos=True)
            seconds = max(self.llm.collective_rpc("stop_attention_timer"))
            self.run.attention_ms.append(1000 * seconds / TIMED_STEPS)

    def close(self) -> None:
        """Ends the engine's processes."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()

    def _generate(self, prompt: str, **sampling: Any) -> Any:
        from vllm import SamplingParams

        messages: Any = [{"role": "user", "content": prompt}]
        parameters = SamplingParams(temperature=0, **sampling)
        (output,) = self.llm.chat([messages], parameters, use_tqdm=False)
        return output
