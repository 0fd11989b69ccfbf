"""One engine with one backend: its answers, and what decoding costs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import LLM

Stage = Callable[[str], AbstractContextManager[None]]  # around each piece of work, with its name

KV_CACHE_BYTES = 1 << 30
ANSWER_TOKENS = 32
TIMED_STEPS = 32


@dataclass(frozen=True)
class Answer:
    """A greedy continuation."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class EngineRun:
    """What one engine did.

    Attributes:
        answers: One per prompt.
        prompt_tokens: Tokens of each prompt.
        tokens_per_s: Decode speed of each repeat, batch 1, prefill not included.
        attention_ms: Decode attention per step of each repeat, all layers; empty where CUDA graphs hide it.
        kv_bytes_per_token: KV memory that one token of context takes.
        block_size: Tokens per block that vLLM allocates.
        head_size: Channels per head.
        counters: How QUEST's counters grew; all zero for a dense backend.
    """

    answers: tuple[Answer, ...]
    prompt_tokens: tuple[int, ...]
    tokens_per_s: tuple[float, ...]
    attention_ms: tuple[float, ...]
    kv_bytes_per_token: float
    block_size: int
    head_size: int
    counters: dict[str, int]


def run_engine(prompts: list[str], repeats: int, stage: Stage, **engine_args: Any) -> EngineRun:
    """Starts an engine, asks, measures, and shuts it down.

    Args:
        prompts: User messages; the first is the one that is timed.
        repeats: How often each time is taken.
        stage: Entered `num_stages` times.
        **engine_args: For vLLM's `LLM`.
    """
    from vllm import LLM
    from vllm.platforms import current_platform

    import vllm_quest

    on_cpu = current_platform.is_cpu()
    before = vllm_quest.read_counters()
    with stage("start the engine"):
        llm = LLM(**(_engine_args(on_cpu) | engine_args))
    try:
        outputs = []
        for number, prompt in enumerate(prompts, start=1):
            with stage(f"question {number}"):
                outputs.append(_generate(llm, prompt, max_tokens=ANSWER_TOKENS, stop=["\n\n"]))
        timings = []
        for _ in range(repeats):
            with stage("time decoding"):
                timings.append(_time_decode(llm, prompts[0]))
        config = llm.llm_engine.vllm_config
        return EngineRun(
            answers=tuple(Answer(o.outputs[0].text, tuple(o.outputs[0].token_ids)) for o in outputs),
            prompt_tokens=tuple(len(o.prompt_token_ids) for o in outputs),
            tokens_per_s=tuple(speed for speed, _ in timings),
            attention_ms=tuple(attention for _, attention in timings) if on_cpu else (),
            kv_bytes_per_token=sum(llm.collective_rpc("kv_bytes_per_token")),
            block_size=config.cache_config.block_size,
            head_size=config.model_config.get_head_size(),
            counters={key: value - before[key] for key, value in vllm_quest.read_counters().items()},
        )
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def num_stages(num_prompts: int, repeats: int) -> int:
    """How many stages `run_engine` has."""
    return 1 + num_prompts + repeats


def _engine_args(on_cpu: bool) -> dict[str, Any]:
    return {
        "dtype": "float32" if on_cpu else "auto",
        "enforce_eager": on_cpu,  # on GPUs CUDA graphs, as users run it
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
        "enable_prefix_caching": True,
        "disable_log_stats": False,  # fills in RequestOutput.metrics
        "use_tqdm_on_load": False,
        "worker_extension_cls": "benchmarks.attention_timer.AttentionTimer",
    }


def _generate(llm: LLM, prompt: str, **sampling: Any) -> Any:
    from vllm import SamplingParams

    messages: Any = [{"role": "user", "content": prompt}]
    (output,) = llm.chat([messages], SamplingParams(temperature=0, **sampling), use_tqdm=False)
    return output


def _time_decode(llm: LLM, prompt: str) -> tuple[float, float]:
    """Decode tokens/s without a timer inside the engine, then milliseconds of attention per step with it.

    vLLM stamps the first and the last token of a request: what lies between is decoding, nothing else.
    """
    metrics = _generate(llm, prompt, max_tokens=TIMED_STEPS + 1, ignore_eos=True).metrics
    speed = TIMED_STEPS / (metrics.last_token_ts - metrics.first_token_ts)
    llm.collective_rpc("start_attention_timer")
    _generate(llm, prompt, max_tokens=TIMED_STEPS + 1, ignore_eos=True)
    seconds = max(llm.collective_rpc("stop_attention_timer"))
    return speed, 1000 * seconds / TIMED_STEPS
