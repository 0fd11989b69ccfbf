"""What the scores of one model and context length say: per task and configuration, and per configuration.

How a task is judged follows from what the dense model makes of it:

    exact  the dense model gives more than half of the answers exactly: share of exact answers
    rank   it ranks the right answer first more than half of the time: share of first ranks
    nll    there is nothing to choose between (prose, summaries, no distractors scored): negative
           log-likelihood of the answer
    None   the dense model cannot do it: reported, and in no average
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import mean

from benchmarks.accuracy.samples import DENSE, Header, Results, Score
from benchmarks.accuracy.statistics import Interval, bootstrap, wilson

__all__ = ["DENSE", "Cell", "Evaluation", "Summary", "differences", "evaluate"]

CAN_DO = 0.5  # share that the dense model must exceed


@dataclass(frozen=True)
class Cell:
    """One task under one configuration; differences are to dense, paired by sample.

    Attributes:
        samples: How many.
        exact: Share of answers whose every token is the argmax.
        first: Share of answers ranked before all distractors; None without distractors.
        nll: Mean over samples, nat per token of the answer.
        rouge: Mean ROUGE-L; None where nothing was generated.
        kl: Mean KL(dense || configuration), nat per token.
        agreement: Share of the dense argmax tokens.
        exact_change: Of `exact`, as `first_change`, `nll_change` and `rouge_change` of theirs; None where
            dense has no score of any of these samples.
    """

    samples: int
    exact: Interval
    first: Interval | None
    nll: Interval
    rouge: Interval | None
    kl: float
    agreement: float
    exact_change: Interval | None
    first_change: Interval | None
    nll_change: Interval | None
    rouge_change: Interval | None

    def right(self, judged: str | None) -> Interval | None:
        """Share of right answers as the task is judged; None where it is not judged by a share."""
        return {"exact": self.exact, "rank": self.first}.get(judged or "")


@dataclass(frozen=True)
class Summary:
    """One configuration over all tasks that the dense model can do.

    Attributes:
        header: What it is and how it was measured.
        kv_bytes_read: KV cache read per decoded token, all layers, bounds included; None where not measured.
        right: Mean over tasks of the share of right answers; None without such tasks.
        right_change: Difference to dense.
        nll_change: Of the mean over tasks, also those judged by log-likelihood, nat per token.
        kl: Mean over the same tasks.
    """

    header: Header
    kv_bytes_read: float | None
    right: float | None
    right_change: Interval | None
    nll_change: Interval | None
    kl: float | None


@dataclass(frozen=True)
class Evaluation:
    """Everything about one model and context length.

    Attributes:
        model: Its name.
        context: Tokens.
        judged: How each task is judged, in the order of measurement.
        cells: By configuration and task.
        summaries: By configuration, dense first.
    """

    model: str
    context: int
    judged: dict[str, str | None]
    cells: dict[tuple[str, str], Cell]
    summaries: dict[str, Summary]


def evaluate(results: Results) -> Evaluation:
    """Cells and summaries of `results`; without scores of dense no task is judged, none averaged."""
    grouped: dict[tuple[str, str], dict[int, Score]] = {}
    for score in results.scores:
        grouped.setdefault((score.configuration, score.task), {})[score.sample] = score
    tasks = list(dict.fromkeys(task for _, task in grouped))
    judged = {task: _judged(grouped.get((DENSE, task), {}).values()) for task in tasks}
    names = sorted(results.headers, key=lambda name: name != DENSE)
    header = results.headers[names[0]]
    return Evaluation(
        model=header.model,
        context=header.context,
        judged=judged,
        cells={key: _cell(scores, grouped.get((DENSE, key[1]), {})) for key, scores in grouped.items()},
        summaries={name: _summary(results.headers, name, grouped, judged) for name in names},
    )


def _judged(dense: Iterable[Score]) -> str | None:
    scores = list(dense)
    if not scores:
        return None
    if mean(score.exact for score in scores) > CAN_DO:
        return "exact"
    if scores[0].rank is None:
        return "nll"
    return "rank" if mean(score.rank == 1 for score in scores) > CAN_DO else None


def _cell(scores: dict[int, Score], dense: dict[int, Score]) -> Cell:
    own = list(scores.values())
    has_rank = own[0].rank is not None
    has_rouge = own[0].rougeL is not None

    def change(value: Callable[[Score], float]) -> Interval | None:
        changes = differences(scores, dense, value)
        return bootstrap([changes]) if changes else None

    return Cell(
        samples=len(own),
        exact=wilson(sum(score.exact for score in own), len(own)),
        first=wilson(sum(score.rank == 1 for score in own), len(own)) if has_rank else None,
        nll=bootstrap([[score.nll for score in own]]),
        rouge=bootstrap([[_rouge(score) for score in own]]) if has_rouge else None,
        kl=mean(score.kl for score in own),
        agreement=mean(score.agreement for score in own),
        exact_change=change(lambda score: score.exact),
        first_change=change(lambda score: score.rank == 1) if has_rank else None,
        nll_change=change(lambda score: score.nll),
        rouge_change=change(_rouge) if has_rouge else None,
    )


def _rouge(score: Score) -> float:
    return score.rougeL or 0.0


def differences(
    scores: dict[int, Score], dense: dict[int, Score], value: Callable[[Score], float]
) -> list[float]:
    return [value(scores[index]) - value(dense[index]) for index in scores if index in dense]


def _right(judged: str | None) -> Callable[[Score], float]:
    return (lambda score: score.exact) if judged == "exact" else (lambda score: score.rank == 1)


def _summary(
    headers: dict[str, Header],
    name: str,
    grouped: dict[tuple[str, str], dict[int, Score]],
    judged: dict[str, str | None],
) -> Summary:
    """Averages only over tasks that the dense model can do and that this configuration was measured on."""
    done = {task: grouped[name, task] for task, how in judged.items() if how and (name, task) in grouped}
    by_share = {task: scores for task, scores in done.items() if judged[task] != "nll"}
    right = [
        differences(scores, grouped[DENSE, task], _right(judged[task])) for task, scores in by_share.items()
    ]
    nll = [differences(scores, grouped[DENSE, task], lambda one: one.nll) for task, scores in done.items()]
    return Summary(
        header=headers[name],
        kv_bytes_read=_kv_bytes_read(headers, name, [s for group in done.values() for s in group.values()]),
        right=mean(mean(map(_right(judged[t]), s.values())) for t, s in by_share.items()) if right else None,
        right_change=bootstrap(right) if right and all(right) else None,
        nll_change=bootstrap(nll) if nll and all(nll) else None,
        kl=mean(mean(score.kl for score in scores.values()) for scores in done.values()) if done else None,
    )


def _kv_bytes_read(headers: dict[str, Header], name: str, scores: list[Score]) -> float | None:
    """From the engine's counters. Rows that select nothing read their whole context as it is stored.

    4-bit keys cannot be read without their bounds, so there all that is stored is read.
    """
    if not scores or DENSE not in headers:
        return None
    header, tokens = headers[name], mean(score.context_tokens for score in scores)
    dense = tokens * headers[DENSE].kv_bytes_per_token
    if header.quest is None:
        return dense
    counters: Counter[str] = Counter()
    for score in scores:
        counters.update(score.counters)
    rows = sum(count for key, count in counters.items() if key.startswith("decode_rows_"))
    if not rows:
        return None
    sparse = counters["decode_rows_sparse"] / rows
    in_full = tokens * header.kv_bytes_per_token if header.quest.get("kv_dtype") == "int4" else dense
    selected = dense * counters["bytes_read"] / counters["bytes_dense"] if sparse else 0.0
    return sparse * selected + (1 - sparse) * in_full
