"""An engine with one backend: its answers, and what prefill and decoding cost."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.metrics.loggers import AggregateStatLoggerBase

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
    """What one engine did for the demo.

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


@dataclass(frozen=True)
class Decoding:
    """One batch decoded to its end, all requests in step.

    Attributes:
        tokens_per_s: All requests together, prefill not included.
        intervals: Seconds between tokens, as vLLM measures them: one per request and step.
    """

    tokens_per_s: float
    intervals: list[float]


class TokenIntervals(AggregateStatLoggerBase):
    """Collects what vLLM measures per step and shows in histograms only."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """Called by vLLM after every step."""
        if iteration_stats is not None:
            self.seconds += iteration_stats.inter_token_latencies_iter

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


class Engine:
    """A running engine; what the demo asks of it is collected in `run`."""

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
            "worker_extension_cls": "benchmarks.engine.attention_timer.AttentionTimer",
        }
        self.llm = LLM(**(defaults | engine_args))
        self.intervals = TokenIntervals()
        assert self.llm.llm_engine.logger_manager is not None  # disable_log_stats is off
        self.llm.llm_engine.logger_manager.stat_loggers.append(self.intervals)
        self.config = self.llm.llm_engine.vllm_config
        self.run = EngineRun(
            kv_bytes_per_token=sum(self.llm.collective_rpc("kv_bytes_per_token")),
            block_size=self.config.cache_config.block_size,
            head_size=self.config.model_config.get_head_size(),
        )

    def ask(self, prompt: str) -> None:
        """Answers `prompt` greedily, one paragraph."""
        (output,) = self._generate([self._chat(prompt)], max_tokens=ANSWER_TOKENS, stop=["\n\n"])
        self.run.answers.append(Answer(output.outputs[0].text, tuple(output.outputs[0].token_ids)))
        self.run.prompt_tokens.append(len(output.prompt_token_ids))

    def time_decoding(self, prompt: str) -> None:
        """Decode tokens/s without a timer inside the engine, then attention per step with one."""
        prompts = [self._chat(prompt)]
        self.run.tokens_per_s.append(self.decode(prompts, TIMED_STEPS).tokens_per_s)
        if self.eager:
            self.run.attention_ms.append(self.attention_ms(prompts, TIMED_STEPS))

    def prefill(self, prompt: list[int]) -> float:
        """Seconds from a prompt's first step to its first token; its blocks stay in the prefix cache."""
        (output,) = self._generate([prompt], max_tokens=1)
        return output.metrics.first_token_ts - output.metrics.scheduled_ts

    def decode(self, prompts: list[list[int]], steps: int) -> Decoding:
        """Decodes `prompts`, whose blocks are in the prefix cache, together.

        vLLM stamps the first and the last token of a request: what lies between is decoding, nothing else.

        Raises:
            RuntimeError: The requests did not run in step: the cache does not hold them all.
        """
        self.intervals.seconds.clear()
        metrics = [
            output.metrics for output in self._generate(prompts, max_tokens=steps + 1, ignore_eos=True)
        ]
        first, last = ({getattr(m, f"{end}_token_ts") for m in metrics} for end in ("first", "last"))
        if len(first) > 1 or len(last) > 1:
            raise RuntimeError(f"{len(prompts)} requests did not decode in step: raise --kv-cache-gib")
        return Decoding(len(prompts) * steps / (last.pop() - first.pop()), list(self.intervals.seconds))

    def attention_ms(self, prompts: list[list[int]], steps: int) -> float:
        """Decode attention per step, all layers together; only where `eager`."""
        self.llm.collective_rpc("start_attention_timer", args=(len(prompts),))
        self._generate(prompts, max_tokens=steps + 1, ignore_eos=True)
        return 1000 * max(self.llm.collective_rpc("stop_attention_timer")) / steps

    def close(self) -> None:
        """Ends the engine's processes."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()

    def _chat(self, prompt: str) -> list[int]:
        messages: Any = [{"role": "user", "content": prompt}]
        tokenizer: Any = self.llm.get_tokenizer()
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    def _generate(self, prompts: list[list[int]], **sampling: Any) -> list[Any]:
        """Runs `prompts`, none before all are queued: else a batch starts request by request."""
        from vllm import SamplingParams

        tokens: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        self.llm.sleep(level=0)
        self.llm.enqueue(tokens, SamplingParams(temperature=0, **sampling), use_tqdm=False)
        self.llm.wake_up(tags=["scheduling"])
        return self.llm.wait_for_completion(use_tqdm=False)
