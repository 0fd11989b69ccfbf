"""The interface between tasks, measurement and report: samples, scores, and the file of raw results.

Tasks build `Sample`s, ``benchmarks.accuracy.tasks.build(tokenizer, context, samples, seed, names)``; the grid
measures each under every configuration and appends one `Score` per sample and configuration; the report reads
them back with `Results`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.common.results import append_line, read_lines
from vllm_quest.tune.samples import Sample

__all__ = ["DENSE", "Header", "Key", "Results", "Sample", "Score", "batches", "by_context"]

DENSE = "dense"  # the configuration that the others are compared with: vLLM's own attention
Key = tuple[str, int]  # task, index of the sample in it
_K = TypeVar("_K")


def by_context(samples: Mapping[_K, Sample]) -> list[list[_K]]:
    """Keys of samples that share a context, in their order."""
    groups: dict[str, list[_K]] = {}
    for key, sample in samples.items():
        groups.setdefault(sample.context_id, []).append(key)
    return list(groups.values())


def batches(samples: Mapping[_K, Sample], contexts_at_once: int) -> Iterator[list[_K]]:
    """Keys of samples that are measured together: those of so many contexts."""
    contexts = by_context(samples)
    for start in range(0, len(contexts), contexts_at_once):
        yield list(chain.from_iterable(contexts[start : start + contexts_at_once]))


@dataclass(frozen=True)
class Score:
    """What one configuration made of one sample, question and answer decoded token by token.

    Attributes:
        configuration: Name of the configuration; its `Header` says what it is. ``dense`` is vLLM's own.
        task: As in the sample.
        sample: Index of the sample within its task, from 0.
        context_tokens: Length of the sample's context.
        tokens: Length of the answer.
        nll: Mean negative log-likelihood of the answer, nat per token.
        exact: Every answer token is the argmax: greedy decoding gives exactly this answer.
        agreement: Share of the answer's positions where the argmax is the dense one.
        kl: Mean KL(dense || configuration) of the next token over the answer's positions, nat. Over the
            top tokens that both returned, all others as one: never more than the whole KL.
        rank: Place of the right answer among itself and the distractors by mean NLL, 1 is best; None without.
        rougeL: Of the generated text against the answer; None where the sample generates nothing.
        counters: Growth of `vllm_quest.read_counters()` while the right answer was decoded, dense layers not
            included; all zero for a dense backend. Of a batch, the share of this sample's decoded tokens.
    """

    configuration: str
    task: str
    sample: int
    context_tokens: int
    tokens: int
    nll: float
    exact: bool
    agreement: float
    kl: float
    rank: int | None = None
    rougeL: float | None = None  # noqa: N815
    counters: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Header:
    """A configuration and the conditions under which it was measured; one line whenever its run starts.

    Attributes:
        configuration: Its name.
        quest: Every field of the `quest` configuration; None for vLLM's own dense attention.
        kv_bytes_per_token: KV memory that one token of context takes, all layers, as vLLM accounts for it.
        block_size: Tokens per block that vLLM allocates.
        model: Name of the model.
        context: Tokens of context that the tasks were built for.
        seconds_per_token: Of one decoded token, batch 1, at that context, measured in the same run; None
            where not measured.
        versions: Of this package, vLLM, torch, Python.
        machine: Device and cores.
        command: What was called.
        date: UTC, ISO 8601.
    """

    configuration: str
    quest: dict[str, Any] | None
    kv_bytes_per_token: float
    block_size: int
    model: str
    context: int
    seconds_per_token: float | None
    versions: dict[str, str]
    machine: dict[str, str]
    command: str
    date: str


class Results:
    """The raw results of one model and context length: JSON lines that are only ever appended to.

    Attributes:
        path: The file.
        headers: By configuration; the last one where a run was resumed.
        scores: All of them, in the order of the file.
    """

    def __init__(self, path: Path) -> None:
        """Reads `path` if it exists; a last line that was cut off by an interruption is dropped."""
        self.path = path
        self.headers: dict[str, Header] = {}
        self.scores: list[Score] = []
        for line in read_lines(path):
            self._take(line)
        self._done = {(score.configuration, score.task, score.sample) for score in self.scores}

    @classmethod
    def in_folder(cls, folder: Path) -> list[Results]:
        """The results of every model and context length in `folder`, by file name."""
        return [cls(path) for path in sorted(folder.glob("*.jsonl"))]

    def has(self, configuration: str, task: str, sample: int) -> bool:
        """Whether this score is there already."""
        return (configuration, task, sample) in self._done

    def append(self, record: Header | Score) -> None:
        """Adds a record, on disk before this returns."""
        kind = "header" if isinstance(record, Header) else "score"
        line = {"kind": kind, **asdict(record)}
        append_line(self.path, line)
        self._take(line)
        if isinstance(record, Score):
            self._done.add((record.configuration, record.task, record.sample))

    def _take(self, line: dict[str, Any]) -> None:
        kind = line.pop("kind")
        if kind == "header":
            self.headers[line["configuration"]] = Header(**line)
        else:
            self.scores.append(Score(**line))
