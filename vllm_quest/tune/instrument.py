"""Decode-mode teacher forcing through the real engine: what the model thought of tokens as it decoded them.

The fast way gives the tokens as the end of a prompt, which `decode_tail` makes decode rows; one step then
does what stepping does in many. The slow way forces the engine to decode them one by one, those of all
continuations in one batch. The context is prefilled once and comes from vLLM's prefix cache afterwards.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from vllm_quest.compat import prefer_v1_model_runner
from vllm_quest.config import QuestConfig

__all__ = ["Continuation", "Instrument", "Position"]

TOP_TOKENS = 64  # log-probabilities returned per position
TIMED_STEPS = 32
CPU_CACHE_BYTES = 1 << 30
FORCED_TOKENS = "forced_tokens"  # in SamplingParams.extra_args: the tokens that a request must decode


@dataclass(frozen=True)
class Continuation:
    """Tokens to decode after a context.

    Attributes:
        context: Token ids, prefilled densely; at least one.
        tokens: Token ids, decoded; at least two. The first is given: prefill predicts it, not decode.
    """

    context: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Position:
    """What the model thought at one decoded token.

    Attributes:
        logprob: Log-probability of the token, nat.
        top: Log-probabilities by token id: the likeliest, and the token itself.
    """

    logprob: float
    top: dict[int, float]

    @property
    def argmax(self) -> int:
        """The likeliest token."""
        return max(self.top, key=self.top.__getitem__)


class Instrument:
    """A running engine that scores continuations.

    Attributes:
        config: The `quest` configuration that decodes; None for vLLM's own dense attention.
        dtype: Of the model: `float32` on CPUs unless asked otherwise, else the one that vLLM chooses.
        block_size: Tokens per block that vLLM allocates.
        has_tail: Whether the backend takes `decode_tail`, so that one step can decode many tokens.
        kv_bytes_per_token: KV memory that one token of context takes, all layers of all ranks.
    """

    def __init__(self, config: QuestConfig | None, max_model_len: int, **engine_args: Any) -> None:
        """Starts vLLM's `LLM` with `engine_args` and what measuring needs.

        Args:
            config: As the attribute; `configure` may change it later.
            max_model_len: Longest context with its tokens.
            engine_args: ``model`` and whatever else `LLM` takes.
        """
        prefer_v1_model_runner()
        from vllm import LLM
        from vllm.platforms import current_platform

        is_cpu = current_platform.is_cpu()
        defaults: dict[str, Any] = {
            "dtype": "float32" if is_cpu else "auto",
            "enforce_eager": True,  # a CUDA graph would hold the first configuration
            "async_scheduling": False,  # which token is forced follows from those already there
            "max_num_seqs": 8,
            "max_num_batched_tokens": max_model_len,
            "enable_chunked_prefill": False,
            "enable_prefix_caching": True,
            "disable_log_stats": False,  # fills in RequestOutput.metrics
            "use_tqdm_on_load": False,
            "max_logprobs": TOP_TOKENS,
            "worker_extension_cls": "vllm_quest.tune.worker.MeasuredWorker",
            "logits_processors": ["vllm_quest.tune.forcing:ForcedTokens"],
        }
        if config is not None:
            defaults |= {"attention_backend": "QUEST", "additional_config": {"quest": asdict(config)}}
        elif is_cpu:
            defaults |= {"attention_backend": "CPU_ATTN"}
        if is_cpu:
            defaults |= {"kv_cache_memory_bytes": CPU_CACHE_BYTES}
        self.llm = LLM(max_model_len=max_model_len, **(defaults | engine_args))
        self.config = config
        self.has_tail = is_cpu  # the GPU backend refuses decode_tail
        vllm_config = self.llm.llm_engine.vllm_config
        self.dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
        self.block_size = vllm_config.cache_config.block_size
        self.kv_bytes_per_token = sum(self.llm.collective_rpc("kv_bytes_per_token"))
        self._salts = (f"measured-{number}" for number in itertools.count())

    @property
    def is_stepping(self) -> bool:
        """Whether `score` decodes token by token.

        Wherever one step does not give what stepping gives. On GPUs dense attention too: they step hundreds
        of samples together, while vLLM hands over a prompt's log-probabilities for all of its context.
        """
        return not self.has_tail or (self.config is not None and not self.config.steps_alike)

    def decode_rows(self, continuation: Continuation) -> int:
        """How many tokens `score` decodes; the last one only in one step with the others."""
        return len(continuation.tokens) - self.is_stepping

    def configure(self, config: QuestConfig) -> None:
        """Selects by `config` from now on; it must agree with the cache in `QuestConfig.cache_fields`."""
        if config != self.config:
            self.llm.collective_rpc("configure_quest", args=(asdict(config),))
            self.config = config

    def score(self, continuations: Sequence[Continuation]) -> list[list[Position]]:
        """Decodes the tokens of each continuation: a position for every token but the first.

        In one step for all continuations with equally many tokens, where that gives what stepping gives.
        """
        if self.is_stepping:
            return self.score_by_stepping(continuations)
        prompts = self._prefilled(continuations)
        results: list[list[Position]] = [[] for _ in continuations]
        for length in sorted({len(one.tokens) for one in continuations}):
            chosen = [i for i, one in enumerate(continuations) if len(one.tokens) == length]
            outputs = self._generate(
                [prompts[i] | _prompt(continuations[i].context + continuations[i].tokens) for i in chosen],
                [{"prompt_logprobs": TOP_TOKENS, "skip_reading_prefix_cache": False}] * len(chosen),
                decode_tail=length,
            )
            for i, output in zip(chosen, outputs, strict=True):
                results[i] = _positions(output.prompt_logprobs[1 - length :], continuations[i].tokens[1:])
        return results

    def score_by_stepping(self, continuations: Sequence[Continuation]) -> list[list[Position]]:
        """As `score`, by decoding the tokens one at a time."""
        prompts = self._prefilled(continuations)
        outputs = self._generate(
            [prompt | _prompt(one.context) for prompt, one in zip(prompts, continuations, strict=True)],
            [_forced(one.tokens) | {"logprobs": TOP_TOKENS} for one in continuations],
        )
        return [
            _positions(output.outputs[0].logprobs[1:], one.tokens[1:])
            for output, one in zip(outputs, continuations, strict=True)
        ]

    def generate(self, continuations: Sequence[Continuation], max_tokens: int) -> list[tuple[int, ...]]:
        """Decodes the tokens of each continuation, then greedily on: the new ids, up to an end token."""
        end = self.llm.get_tokenizer().eos_token_id
        prompts = self._prefilled(continuations, extra=max_tokens)
        outputs = self._generate(
            [prompt | _prompt(one.context) for prompt, one in zip(prompts, continuations, strict=True)],
            [_forced(one.tokens, then=max_tokens) for one in continuations],
        )
        generated = [
            output.outputs[0].token_ids[len(one.tokens) :]
            for output, one in zip(outputs, continuations, strict=True)
        ]
        return [tuple(itertools.takewhile(lambda token: token != end, tokens)) for tokens in generated]

    def seconds_per_token(self, context: Sequence[int], repeats: int = 3) -> float:
        """Median time of one greedy decode step after `context`, batch 1, prefill not included."""
        times = []
        for _ in range(repeats):
            (output,) = self._generate(
                [_prompt(context) | {"cache_salt": "timed"}],
                [{"max_tokens": TIMED_STEPS + 1}],
            )
            times.append((output.metrics.last_token_ts - output.metrics.first_token_ts) / TIMED_STEPS)
        return median(times)

    def close(self) -> None:
        """Ends the engine's processes."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()

    def _prefilled(self, continuations: Iterable[Continuation], extra: int = 0) -> list[dict[str, Any]]:
        """Fills the prefix cache with every context; what a prompt needs to find it there.

        A block that ends behind the context would be cached as this configuration computed it, for all that
        come later. Where there is one, the continuation gets a cache of its own.
        """
        prompts = []
        contexts: dict[tuple[tuple[int, ...], str], dict[str, Any]] = {}
        for one in continuations:
            fits = len(one.context) % self.block_size + len(one.tokens) + extra < self.block_size
            prompt = {} if fits else {"cache_salt": next(self._salts)}
            prompts.append(prompt)
            contexts[one.context, prompt.get("cache_salt", "")] = prompt
        self._generate(
            [prompt | _prompt(context) for (context, _), prompt in contexts.items()], [{}] * len(contexts)
        )
        return prompts

    def _generate(
        self, prompts: list[dict[str, Any]], sampling: list[dict[str, Any]], decode_tail: int = 0
    ) -> list[Any]:
        from vllm import SamplingParams

        if self.config is not None:
            self.configure(replace(self.config, decode_tail=decode_tail))
        common: dict[str, Any] = {
            "temperature": 0,
            "max_tokens": 1,
            "ignore_eos": True,
            "detokenize": False,
            "flat_logprobs": True,
        }
        return self.llm.generate(
            prompts, [SamplingParams(**(common | one)) for one in sampling], use_tqdm=False
        )


def _prompt(tokens: Sequence[int]) -> dict[str, Any]:
    return {"prompt_token_ids": list(tokens)}


def _forced(tokens: Sequence[int], then: int = 0) -> dict[str, Any]:
    """Sampling that decodes `tokens`, then at most `then` of the model's own."""
    return {"max_tokens": len(tokens) + then, "extra_args": {FORCED_TOKENS: list(tokens)}}


def _positions(logprobs: Iterable[Any], tokens: Sequence[int]) -> list[Position]:
    positions = []
    for token, entries in zip(tokens, logprobs, strict=True):
        top = {id_: entry.logprob for id_, entry in entries.items()}
        positions.append(Position(top[token], top))
    return positions
