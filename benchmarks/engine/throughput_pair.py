"""Two engines that do the same, alternating."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import numpy as np

from benchmarks.common.pairs import Ratio, first_context
from benchmarks.engine.contenders import Contender
from benchmarks.engine.run import Engine
from benchmarks.kernels.roofline import Geometry, Step, quest_bytes
from vllm_quest.config import QuestConfig

PROBE_STEPS, PROBE_REPEATS = 16, 3


@dataclass
class Samples:
    """What one engine did in one cell: an entry per repeat, or all that vLLM saw."""

    prefill_s: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)
    intervals: list[float] = field(default_factory=list)
    attention_ms: list[float] = field(default_factory=list)


class Pair:
    """The baseline and a contender, both running.

    Args:
        baseline, contender: Each with its engine.
        speed: Memory bandwidth in GB/s, for limits.
        steps: Decode steps of one timing.
        repeats: Timings of each.
    """

    def __init__(
        self,
        baseline: tuple[Contender, Engine],
        contender: tuple[Contender, Engine],
        speed: float,
        steps: int,
        repeats: int,
    ) -> None:
        self.sides = (baseline, contender)
        self.speed, self.steps, self.repeats = speed, steps, repeats
        self.config = baseline[1].config

    def cell(self, context: int, batch: int) -> dict[str, Any]:
        """Prefill, decode and memory at `context` tokens and `batch` requests."""
        samples = [Samples(), Samples()]
        self._prefilled(context, 1, [Samples(), Samples()])  # the first of its length is not counted
        if (more := self.repeats - batch) > 0:
            self._prefilled(context, more, samples)
        prompts = self._prefilled(context, batch, samples)
        for repeat in range(-1, self.repeats):  # the first is not counted
            for side, engine in self._turn(repeat):
                decoding = engine.decode(prompts, self.steps)
                if repeat >= 0:
                    samples[side].tokens_per_s.append(decoding.tokens_per_s)
                    samples[side].intervals += decoding.intervals
        if self.sides[0][1].eager:
            for repeat in range(self.repeats):
                for side, engine in self._turn(repeat):
                    samples[side].attention_ms.append(engine.attention_ms(prompts, self.steps))
        sides = [self._summary(side, samples[side], context, batch) for side in (0, 1)]
        return {"bandwidth": self.speed, "baseline": sides[0], "measured": sides[1], **_ratios(*samples)}

    def break_even(self, batch: int, longest: int) -> dict[str, Any]:
        """The shortest context at which the contender decodes faster, found by bisection.

        At and below the budget both do the same. ``context`` is None where the contender wins nowhere up to
        `longest`.
        """
        quest = self.sides[1][0].quest
        assert quest is not None
        assert quest.token_budget is not None
        step = self.config.cache_config.block_size
        longest = longest // step * step
        probes: dict[int, float] = {}

        def wins(context: int) -> bool:
            prompts = self._prefilled(context, batch, [Samples(), Samples()])
            speeds: list[list[float]] = [[], []]
            for repeat in range(PROBE_REPEATS):
                for side, engine in self._turn(repeat):
                    speeds[side].append(engine.decode(prompts, PROBE_STEPS).tokens_per_s)
            probes[context] = Ratio.of(speeds[1], speeds[0]).median
            return probes[context] > 1

        found = None
        if wins(longest):
            found = first_context(wins, max(quest.token_budget, quest.min_context), longest, step)
        return {"found": found, "probes": probes, "resolution": step}

    def _turn(self, repeat: int) -> list[tuple[int, Engine]]:
        """Both sides; who begins alternates."""
        sides = [(side, self.sides[side][1]) for side in (0, 1)]
        return sides if repeat % 2 else sides[::-1]

    def _prefilled(self, context: int, batch: int, samples: list[Samples]) -> list[list[int]]:
        """`batch` prompts that are in both prefix caches; `samples` get the prefill times, one per prompt.

        The cache is emptied first, so that nothing of other contexts is evicted at an unknown moment.
        """
        vocabulary = self.config.model_config.get_vocab_size()
        draw = random.Random(context)
        prompts = [draw.choices(range(10, vocabulary), k=context) for _ in range(batch)]
        for _, engine in self.sides:
            engine.llm.reset_prefix_cache()
        for number, prompt in enumerate(prompts):
            for side, engine in self._turn(number):
                samples[side].prefill_s.append(engine.prefill(prompt))
        print(f"prefilled {batch} x {context} tokens", file=sys.stderr, flush=True)
        return prompts

    def _summary(self, side: int, samples: Samples, context: int, batch: int) -> dict[str, Any]:
        contender, engine = self.sides[side]
        attention, weights = self._bytes(contender, engine, context + self.steps // 2, batch)
        p50, p99 = (1000 * float(seconds) for seconds in np.percentile(samples.intervals, [50, 99]))
        cache = engine.config.cache_config
        limit = batch * self.speed * 1e9 / (attention + weights)
        summary = {
            "name": contender.name,
            "prefill_tokens_per_s": context / median(samples.prefill_s),
            "tokens_per_s": median(samples.tokens_per_s),
            "tpot_p50_ms": p50,
            "tpot_p99_ms": p99,
            "limit_tokens_per_s": limit,
            "share_of_limit": median(samples.tokens_per_s) / limit,
            "kv_tokens": cache.kv_cache_size_tokens,
            "requests_at_once": cache.kv_cache_size_tokens // (context + self.steps + 1),
            "kv_bytes_per_token": engine.run.kv_bytes_per_token,
            "peak_memory_bytes": max(engine.llm.collective_rpc("peak_memory_bytes")),
            "samples": {
                "prefill_s": samples.prefill_s,
                "tokens_per_s": samples.tokens_per_s,
                "attention_ms": samples.attention_ms,
            },
        }
        if samples.attention_ms:
            summary["attention_ms"] = median(samples.attention_ms)
            summary["attention_share_of_limit"] = attention / self.speed / 1e6 / summary["attention_ms"]
        return summary

    def _bytes(self, contender: Contender, engine: Engine, context: int, batch: int) -> tuple[int, int]:
        """What one step must move: attention of all layers, and weights."""
        model, parallel = self.config.model_config, self.config.parallel_config
        geometry = Geometry(
            model.get_num_attention_heads(parallel), model.get_num_kv_heads(parallel), model.get_head_size()
        )
        step = Step(
            geometry, batch, context, block_size=engine.run.block_size, element_size=model.dtype.itemsize
        )
        layers, quest = model.get_num_layers(parallel), contender.quest
        if quest is None:
            attention = layers * sum(step.dense().values())
        else:
            dense = replace(step, **quest_bytes(quest, geometry.head_size))
            sparse = replace(dense, token_budget=_tokens_read(quest, context), page_size=quest.page_size)
            dense = replace(dense, token_budget=context)
            attention = quest.dense_layers * sum(dense.quest().values())
            attention += (layers - quest.dense_layers) * sum(sparse.quest().values())
        return attention, sum(engine.llm.collective_rpc("weight_bytes_per_step"))


def _tokens_read(quest: QuestConfig, context: int) -> int:
    return context if quest.token_budget is None or context < quest.min_context else quest.token_budget


def _ratios(baseline: Samples, measured: Samples) -> dict[str, Any]:
    """How many times as fast the contender is."""
    ratios = {
        "decode": Ratio.of(measured.tokens_per_s, baseline.tokens_per_s),
        "prefill": Ratio.of(baseline.prefill_s, measured.prefill_s),
    }
    if measured.attention_ms:
        ratios["attention"] = Ratio.of(baseline.attention_ms, measured.attention_ms)
    return {"ratios": {name: vars(ratio) for name, ratio in ratios.items()}}
