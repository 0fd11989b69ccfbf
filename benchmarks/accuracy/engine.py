"""From samples to scores: what one engine makes of them, and what dense attention made of them before."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import vllm_quest
from benchmarks.accuracy.samples import Key, Sample, Score
from benchmarks.common.results import append_line, read_lines
from vllm_quest.tune.comparison import compare, nll
from vllm_quest.tune.instrument import Continuation, Instrument, Position

__all__ = ["References", "measure"]

Rouge = Callable[[str, str], float]  # of the reference and the generated text


class References:
    """What dense attention thought of each answer: a file of JSON lines, so that a run resumes."""

    def __init__(self, path: Path) -> None:
        """Reads `path` if it exists."""
        self.path = path
        self._positions: dict[Key, list[Position]] = {}
        for task, index, answer in read_lines(path):
            self._positions[task, index] = [
                Position(logprob, {int(token): value for token, value in top.items()})
                for logprob, top in answer
            ]

    def __contains__(self, key: Key) -> bool:
        return key in self._positions

    def __getitem__(self, key: Key) -> list[Position]:
        return self._positions[key]

    def add(self, key: Key, answer: list[Position]) -> None:
        """Keeps the positions of one answer."""
        append_line(self.path, [*key, [[one.logprob, one.top] for one in answer]])
        self._positions[key] = answer


def measure(
    instrument: Instrument,
    configuration: str,
    samples: dict[Key, Sample],
    references: References,
    rouge: Rouge,
) -> list[Score]:
    """Scores of `samples` under the configuration that `instrument` has; of dense they become the references.

    Args:
        instrument: Dense for samples that `references` does not have.
        configuration: The name of the configuration.
        samples: Only so many contexts at a time as fit the prefix cache.
        references: The dense answers.
        rouge: ROUGE-L of the reference and a generated text.
    """
    answers, counters = _right_answers(instrument, samples)
    ranks = _ranks(instrument, samples, answers)
    rouges = _rouges(instrument, samples, rouge)
    scores = []
    for key, sample in samples.items():
        if instrument.config is None and key not in references:
            references.add(key, answers[key])
        result = compare(references[key], answers[key])
        task, index = key
        scores.append(
            Score(
                configuration=configuration,
                task=task,
                sample=index,
                context_tokens=len(sample.context),
                tokens=len(sample.answer),
                nll=result.nll,
                exact=result.exact,
                agreement=result.agreement,
                kl=result.kl,
                rank=ranks[key],
                rougeL=rouges.get(key),
                counters=counters[key],
            )
        )
    return scores


def _right_answers(
    instrument: Instrument, samples: dict[Key, Sample]
) -> tuple[dict[Key, list[Position]], dict[Key, dict[str, int]]]:
    """The positions of each answer, and the counters' growth meanwhile.

    What a row reads follows from its context, so samples of equally long contexts share the growth of their
    batch by their rows. The sum is exact; what one sample has of it is as exact as its question and answer
    are short compared with the context.
    """
    groups: dict[int, list[Key]] = defaultdict(list)
    for key, sample in samples.items():
        groups[len(sample.context)].append(key)
    answers: dict[Key, list[Position]] = {}
    counters: dict[Key, dict[str, int]] = {}
    for keys in groups.values():
        batch = [_continuation(samples[key], samples[key].answer) for key in keys]
        before = vllm_quest.read_counters()
        results = instrument.score(batch)
        after = vllm_quest.read_counters()
        rows = [instrument.decode_rows(one) for one in batch]
        for key, positions, own in zip(keys, results, rows, strict=True):
            answers[key] = positions[-len(samples[key].answer) :]
            counters[key] = {name: round((after[name] - before[name]) * own / sum(rows)) for name in after}
    return answers, counters


def _ranks(
    instrument: Instrument, samples: dict[Key, Sample], answers: dict[Key, list[Position]]
) -> dict[Key, int | None]:
    """The place of each right answer among its distractors; None without."""
    wrong = [(key, tokens) for key, sample in samples.items() for tokens in sample.distractors]
    results = (
        instrument.score([_continuation(samples[key], tokens) for key, tokens in wrong]) if wrong else []
    )
    better: dict[Key, int] = defaultdict(int)
    for (key, tokens), positions in zip(wrong, results, strict=True):
        better[key] += nll(positions[-len(tokens) :]) < nll(answers[key])
    return {key: 1 + better[key] if sample.distractors else None for key, sample in samples.items()}


def _rouges(instrument: Instrument, samples: dict[Key, Sample], rouge: Rouge) -> dict[Key, float]:
    """Of what is generated, for the samples that ask for it."""
    groups: dict[int, list[Key]] = defaultdict(list)
    for key, sample in samples.items():
        if sample.generate:
            groups[sample.generate].append(key)
    decode = instrument.llm.get_tokenizer().decode
    rouges: dict[Key, float] = {}
    for length, keys in groups.items():
        asked = [Continuation(samples[key].context, samples[key].question) for key in keys]
        for key, generated in zip(keys, instrument.generate(asked, length), strict=True):
            rouges[key] = rouge(decode(samples[key].answer), decode(generated))
    return rouges


def _continuation(sample: Sample, answer: Sequence[int]) -> Continuation:
    return Continuation(sample.context, (*sample.question, *answer))
