"""The cheapest configuration within a loss: a bounded search over budgets, pages, dense layers, formats."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

import vllm_quest
from vllm_quest.config import QuestConfig
from vllm_quest.tune.comparison import nll
from vllm_quest.tune.instrument import Continuation, Instrument, Position
from vllm_quest.tune.samples import Sample

__all__ = ["Dense", "Trial", "budgets", "cheapest", "measure", "measure_dense", "smallest_passing"]

SHARES = (32, 16, 8, 4, 2)  # of the context that a budget may be, smallest first
DENSE_LAYERS = (0, 2)
CAN_RECALL = 0.5  # share of right tokens from which recall counts
Z = 1.96  # of a 95 % interval


@dataclass(frozen=True)
class Dense:
    """What dense attention makes of the probes.

    Attributes:
        answers: The positions of every sample's answer.
        recall: Share of right tokens in the lists, percent.
        kv_bytes_per_token: KV memory that one token takes.
        dtype: Of the model, and so of that memory.
    """

    answers: list[list[Position]]
    recall: float
    kv_bytes_per_token: float
    dtype: str

    @property
    def can_recall(self) -> bool:
        """Whether recall says anything about this model."""
        return self.recall > 100 * CAN_RECALL


@dataclass(frozen=True)
class Trial:
    """What one configuration loses, and what it reads.

    Attributes:
        config: The configuration.
        text_loss: Rise of the perplexity of the texts, percent.
        text_error: Half of its 95 % interval over passages, percentage points.
        recall_loss: Fall of the share of right tokens, percentage points; None where dense cannot recall.
        read_share: KV bytes read per decoded token, of what dense attention reads.
        memory_share: KV memory per token, of what dense attention takes.
    """

    config: QuestConfig
    text_loss: float
    text_error: float
    recall_loss: float | None
    read_share: float
    memory_share: float

    @property
    def worst_text_loss(self) -> float:
        """The upper end of its interval."""
        return self.text_loss + self.text_error

    def passes(self, max_loss: float) -> bool:
        """Whether neither text nor recall loses more than `max_loss` percent."""
        return self.text_loss <= max_loss and (self.recall_loss is None or self.recall_loss <= max_loss)


def budgets(context: int, config: QuestConfig) -> list[int | None]:
    """Token budgets to try with `config`'s pages, ascending.

    4 bits cost something even where all is read, so there that is the last one; once, since dense layers
    are no other configuration then.
    """
    always = (config.sink_pages + config.recent_pages + 1) * config.page_size
    parts = [context // share // config.page_size * config.page_size for share in SHARES]
    ascending: list[int | None] = [*sorted({max(part, always) for part in parts})]
    return [*ascending, None] if config.kv_dtype == "int4" and not config.dense_layers else ascending


def smallest_passing(config: QuestConfig, context: int, try_one: Callable[[QuestConfig], bool]) -> None:
    """Tries budgets by bisection: a larger one is taken to lose no more."""
    ladder = budgets(context, config)
    low, high = 0, len(ladder)
    while low < high:
        middle = (low + high) // 2
        if try_one(replace(config, token_budget=ladder[middle])):
            high = middle
        else:
            low = middle + 1


def cheapest(trials: Iterable[Trial], max_loss: float) -> Trial | None:
    """The trial that reads least of those that pass; None where none does."""
    passing = [trial for trial in trials if trial.passes(max_loss)]
    return min(passing, key=lambda trial: (trial.read_share, trial.text_loss), default=None)


def measure_dense(instrument: Instrument, samples: Sequence[Sample]) -> Dense:
    """What the other configurations are compared with; `instrument` runs vLLM's own attention."""
    answers = _answers(instrument, samples)
    right = [_right(answer) for answer, one in zip(answers, samples, strict=True) if one.task == "recall"]
    return Dense(answers, fmean(right), instrument.kv_bytes_per_token, instrument.dtype)


def measure(instrument: Instrument, samples: Sequence[Sample], dense: Dense) -> Trial:
    """Measures the configuration that `instrument` has."""
    assert instrument.config is not None
    before = vllm_quest.read_counters()
    answers = _answers(instrument, samples)
    after = vllm_quest.read_counters()
    losses: dict[str, list[float]] = {"text": [], "recall": []}
    for sample, old, new in zip(samples, dense.answers, answers, strict=True):
        loss = nll(new) - nll(old) if sample.task == "text" else _right(old) - _right(new)
        losses[sample.task].append(loss)
    text = losses["text"]
    growth = {name: after[name] - before[name] for name in after}
    return Trial(
        config=instrument.config,
        text_loss=100 * math.expm1(fmean(text)),
        text_error=100 * Z * stdev(text) / math.sqrt(len(text)),
        recall_loss=fmean(losses["recall"]) if dense.can_recall else None,
        read_share=_read_share(instrument, samples, growth, dense),
        memory_share=instrument.kv_bytes_per_token / dense.kv_bytes_per_token,
    )


def _answers(instrument: Instrument, samples: Sequence[Sample]) -> list[list[Position]]:
    """Context by context, so that the prefix cache needs to hold one."""
    answers: list[list[Position]] = [[] for _ in samples]
    for context in dict.fromkeys(sample.context for sample in samples):
        chosen = [index for index, sample in enumerate(samples) if sample.context == context]
        scored = instrument.score(
            [Continuation(context, samples[index].question + samples[index].answer) for index in chosen]
        )
        for index, positions in zip(chosen, scored, strict=True):
            answers[index] = positions[-len(samples[index].answer) :]
    return answers


def _right(answer: Sequence[Position]) -> float:
    """Percentage of the tokens that are the argmax."""
    return 100 * fmean(one.top[one.argmax] == one.logprob for one in answer)


def _read_share(
    instrument: Instrument, samples: Sequence[Sample], growth: dict[str, int], dense: Dense
) -> float:
    """KV bytes read per decoded token, all layers; dense rows read K and V, in 4 bits also bounds."""
    assert instrument.config is not None
    stored = (instrument if instrument.config.kv_dtype == "int4" else dense).kv_bytes_per_token
    given = 0 if instrument.config.steps_alike else 1  # stepping does not decode the last token
    decoded = sum(len(one.question) + len(one.answer) - given for one in samples)
    sparse = growth["decode_rows_sparse"]
    rows = sparse + sum(amount for name, amount in growth.items() if name.startswith("decode_rows_dense"))
    context = fmean(len(one.context) for one in samples)
    densely = (1 - sparse / rows) * stored * context
    return (growth["bytes_read"] / decoded + densely) / (dense.kv_bytes_per_token * context)
