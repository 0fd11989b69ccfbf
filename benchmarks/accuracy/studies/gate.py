"""The quality gate of the 4-bit cache: what configurations lose against dense attention, token by token.

    python -m benchmarks.accuracy gate [--model MODEL] [--quest JSON ...]
        [--simulate flexgen int4_per_token_head] [--kv-cache-dtype DTYPE ...] [--json PATH]

Code and prose lose at most 0.01 nat per decoded token, key-value recall at most 2 points of its digits; each
with a 95 % interval over samples, paired with dense. Ends with status 1 if a configuration's estimate fails.
Formats that others have can be measured, too: their values in QUEST's pages, or vLLM's own caches themselves.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

from tqdm import tqdm

from benchmarks.accuracy.configurations import Configurations, by_cache, from_entries
from benchmarks.accuracy.grid import DENSE
from benchmarks.accuracy.samples import Sample, batches
from benchmarks.accuracy.statistics import Interval, bootstrap
from benchmarks.accuracy.studies.formats import SIMULATED
from benchmarks.common.arguments import command_line, json_object, of_model
from benchmarks.common.machine import machine
from benchmarks.common.results import write_json
from tools.small_model import prepare_model
from vllm_quest.config import QuestConfig
from vllm_quest.tune.instrument import Continuation, Instrument, Position
from vllm_quest.tune.probes import without_blank

__all__ = ["main"]

MAX_NLL_LOSS = 0.01  # nat per token
MAX_RECALL_LOSS = 2.0  # percentage points
LEAD_TOKENS, ANSWER_TOKENS = 24, 64  # of one passage of code
PASSAGES = 6  # per context
DEFAULT: list[dict[str, Any]] = [
    {"token_budget": None, "kv_dtype": "int4", "page_size": 16},
    {"token_budget": None, "kv_dtype": "int4", "page_size": 16, "bounds_dtype": "bfloat16"},
    {"token_budget": None, "kv_dtype": "int4", "page_size": 8},
    {"token_budget": None, "kv_dtype": "int4", "page_size": 8, "bounds_dtype": "bfloat16"},
    {"token_budget": None, "kv_dtype": "int4", "page_size": 16, "value_group_size": 32},
]
# By kind: the answers of every sample, position by position.
Answers = dict[str, list[list[Position]]]


@dataclass(frozen=True)
class Engine:
    """One engine of vLLM.

    Attributes:
        configurations: By name, of the same cache, what decodes in turn; None for vLLM's own attention.
        arguments: More of vLLM's.
    """

    configurations: dict[str, QuestConfig | None]
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Loss:
    """What one configuration loses against dense on one kind of text.

    Attributes:
        tokens: Decoded tokens that count.
        dense: NLL in nat per token, for recall the share of right digits in percent.
        loss: Rise of the NLL, or fall of that share; mean over samples.
        limit: What the gate allows.
    """

    tokens: int
    dense: float
    loss: Interval
    limit: float

    @property
    def passes(self) -> bool:
        """Whether the estimate is within the limit."""
        return self.loss.value <= self.limit


def main(arguments: list[str]) -> None:
    """Measures and prints a line per configuration and kind."""
    options = _options(arguments)
    configurations: Configurations = {}
    for entries in options.quest or DEFAULT:
        configurations |= from_entries(entries)
    engines = [Engine(dict(group)) for group in by_cache(configurations)]
    if options.simulate:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # they are registered in this process
    for name in options.simulate:
        config = QuestConfig(token_budget=None, kv_dtype=name)
        engines.append(Engine({f"{name}, simulated": config}))
    engines += [Engine({dtype: None}, {"kv_cache_dtype": dtype}) for dtype in options.kv_cache_dtype]
    model = options.model or str(prepare_model())
    losses: dict[str, dict[str, Loss]] = {}
    samples = _samples(model, options.context, options.text_tokens, options.queries)
    for name, kinds in _measure(model, engines, samples, options.engine_args, options.contexts_at_once):
        losses[name] = kinds
        for kind, loss in kinds.items():
            print(f"{name}: {_line(kind, loss)}", flush=True)
        if options.json:
            write_json(options.json, _as_json(model, options.context, engines, losses))
    if not all(loss.passes for kinds in losses.values() for loss in kinds.values()):
        sys.exit("the gate is not passed")


def _as_json(
    model: str, context: int, engines: list[Engine], losses: dict[str, dict[str, Loss]]
) -> dict[str, Any]:
    """What is measured so far."""
    configurations = {
        name: engine.arguments if config is None else asdict(config)
        for engine in engines
        for name, config in engine.configurations.items()
    }
    return {
        "machine": machine(),
        "model": Path(model).name,
        "context": context,
        "configurations": {name: configurations[name] for name in losses},
        "losses": {
            name: {kind: asdict(one) for kind, one in kinds.items()} for name, kinds in losses.items()
        },
    }


def _measure(
    model: str,
    engines: list[Engine],
    samples: dict[str, list[Sample]],
    engine_args: dict[str, Any],
    contexts_at_once: int,
) -> Iterator[tuple[str, dict[str, Loss]]]:
    """Losses by kind, a configuration at a time; dense is measured first."""
    engines = [Engine({DENSE: None}), *engines]
    longest = max(
        len(one.context) + len(one.question) + len(one.answer) + 1
        for group in samples.values()
        for one in group
    )
    answers: dict[str, Answers] = {}
    configurations = sum(len(engine.configurations) for engine in engines)
    with tqdm(total=configurations * sum(map(len, samples.values())), unit="sample") as bar:
        for engine in engines:
            instrument = Instrument(
                next(iter(engine.configurations.values())),
                longest,
                model=model,
                **engine_args | engine.arguments,
            )
            try:
                for name, config in engine.configurations.items():
                    bar.set_description(name)
                    if config is not None:
                        instrument.configure(config)
                    answers[name] = {
                        kind: _answers(instrument, group, contexts_at_once, bar)
                        for kind, group in samples.items()
                    }
                    if name != DENSE:
                        dense, own = answers[DENSE], answers[name]
                        yield name, {kind: _loss(kind, dense[kind], own[kind]) for kind in own}
            finally:
                instrument.close()


def _answers(
    instrument: Instrument, samples: list[Sample], contexts_at_once: int, bar: tqdm
) -> list[list[Position]]:
    """The positions of every answer, some contexts at a time."""
    answers: list[list[Position]] = []
    for indices in batches(dict(enumerate(samples)), contexts_at_once):
        group = [samples[index] for index in indices]
        scored = instrument.score([Continuation(one.context, (*one.question, *one.answer)) for one in group])
        answers += [positions[-len(one.answer) :] for one, positions in zip(group, scored, strict=True)]
        bar.update(len(group))
    return answers


def _loss(kind: str, dense: list[list[Position]], own: list[list[Position]]) -> Loss:
    before, after = ([_value(kind, answer) for answer in answers] for answers in (dense, own))
    sign = -1 if kind == "recall" else 1
    differences = [sign * (now - then) for then, now in zip(before, after, strict=True)]
    return Loss(
        tokens=sum(map(len, own)),
        dense=fmean(before),
        loss=bootstrap([differences]),
        limit=MAX_RECALL_LOSS if kind == "recall" else MAX_NLL_LOSS,
    )


def _value(kind: str, answer: list[Position]) -> float:
    """Of recall the percentage of right tokens, else nat per token."""
    if kind == "recall":
        return 100 * fmean(one.top[one.argmax] == one.logprob for one in answer)
    return -fmean(one.logprob for one in answer)


def _line(kind: str, loss: Loss) -> str:
    unit = "points of right digits" if kind == "recall" else "nat per token"
    value, low, high = loss.loss
    verdict = "passes" if loss.passes else "FAILS"
    return (
        f"{kind} loses {value:+.4f} [{low:+.4f}, {high:+.4f}] {unit} over {loss.tokens} tokens "
        f"(dense {loss.dense:.4f}, limit {loss.limit}): {verdict}"
    )


def _samples(model: str, context: int, text_tokens: int, queries: int) -> dict[str, list[Sample]]:
    """Prose and key-value recall as the tasks have them, and the standard library's source, continued."""
    from transformers import AutoTokenizer

    from benchmarks.accuracy import tasks

    tokenizer = AutoTokenizer.from_pretrained(model)
    passages = -(-text_tokens // ANSWER_TOKENS)
    recall = tasks.build(tokenizer, context, queries, 0, ["key_value"])
    return {
        "prose": tasks.build(tokenizer, context, passages, 0, ["prose"]),
        "code": _code(tokenizer, context, passages),
        "recall": [without_blank(tokenizer, sample) for sample in recall],
    }


def _code(tokenizer: Any, context: int, count: int) -> list[Sample]:
    """Passages from what follows each context, as of prose."""
    from benchmarks.accuracy.tasks.prompt import context_room, fill, plain_frame
    from benchmarks.accuracy.tasks.text import modules

    frame = plain_frame(tokenizer)
    room, passage = context_room(context, frame), LEAD_TOKENS + ANSWER_TOKENS
    sources = [module.source for module in modules()]
    samples: list[Sample] = []
    while len(samples) < count:
        context_id = f"code-{len(samples)}"
        Random(context_id).shuffle(sources)
        tokens, _ = fill(tokenizer, sources, room + PASSAGES * passage)
        samples += [
            Sample(
                task="code",
                context_id=context_id,
                context=(*frame.head, *tokens[:room]),
                question=tokens[start : start + LEAD_TOKENS],
                answer=tokens[start + LEAD_TOKENS : start + passage],
            )
            for start in range(room, len(tokens), passage)
        ]
    return samples[:count]


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = command_line(__doc__, of_model(), command="gate")
    parser.add_argument("--context", type=int, default=4096, metavar="N", help="tokens; default: 4096")
    parser.add_argument(
        "--quest",
        action="append",
        type=json_object,
        metavar="JSON",
        help="a configuration; repeatable; default: dense attention over 4-bit caches",
    )
    parser.add_argument(
        "--simulate",
        nargs="+",
        default=[],
        choices=SIMULATED,
        metavar="FORMAT",
        help=f"others' formats too, by their values, on CPUs: {', '.join(SIMULATED)}",
    )
    parser.add_argument(
        "--kv-cache-dtype",
        action="append",
        default=[],
        metavar="DTYPE",
        help="vLLM's own cache, read densely, too: on GPUs int4_per_token_head; repeatable",
    )
    parser.add_argument(
        "--text-tokens", type=int, default=1024, help="decoded per kind; default: %(default)s"
    )
    parser.add_argument("--queries", type=int, default=100, help="of recall; default: %(default)s")
    parser.add_argument(
        "--contexts-at-once", type=int, default=1, metavar="N", help="as for the grid; default: 1"
    )
    parser.add_argument("--engine-args", type=json_object, default={}, metavar="JSON", help="more of vLLM's")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write everything measured to PATH")
    return parser.parse_args(arguments)
