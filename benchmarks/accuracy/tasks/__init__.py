"""Tasks in the six categories of arXiv 2407.01527 and real prose; one small file each.

A task is a function ``samples(tokenizer, context_tokens, count, seed) -> list[Sample]``, deterministic in its
arguments. Context, question and answer of a sample fit into `context_tokens`; the context is always
`prompt.QUESTION_ROOM` shorter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from benchmarks.accuracy.samples import Key, Sample
from benchmarks.accuracy.tasks import (
    code_completion,
    few_shot,
    key_value,
    multi_document,
    needle,
    prose,
    single_document,
    summarization,
)
from benchmarks.accuracy.tasks.prompt import TaskError
from benchmarks.accuracy.tasks.summarization import rouge_l

__all__ = ["TASKS", "TaskError", "build", "numbered", "rouge_l", "unranked"]

TASKS: dict[str, Callable[[Any, int, int, int], list[Sample]]] = {
    task.TASK: task.samples
    for task in (
        needle,
        key_value,
        single_document,
        multi_document,
        few_shot,
        code_completion,
        summarization,
        prose,
    )
}


def build(tokenizer: Any, context: int, samples: int, seed: int, names: list[str]) -> list[Sample]:
    """`samples` samples of each of the tasks `names`, in `context` tokens.

    Raises:
        TaskError: There is no such task, or one cannot be built at that length.
    """
    for name in names:
        if name not in TASKS:
            raise TaskError(f"--tasks: no task {name!r}; allowed: {', '.join(TASKS)}")
    return [sample for name in names for sample in TASKS[name](tokenizer, context, samples, seed)]


def numbered(model: str, context: int, samples: int, seed: int, names: Iterable[str]) -> dict[Key, Sample]:
    """As `build` with the tokenizer of `model`, by task and index in it; raises the same."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return {
        (name, index): sample
        for name in names
        for index, sample in enumerate(build(tokenizer, context, samples, seed, [name]))
    }


def unranked(samples: Mapping[Key, Sample]) -> dict[Key, Sample]:
    """The same without distractors, which are most of the work."""
    return {key: replace(sample, distractors=()) for key, sample in samples.items()}
