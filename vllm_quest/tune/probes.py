"""What a configuration is judged by without any task at hand: a text to go on with, and recall from a list.

Text alone would not do: a scorer that averages over heads keeps it and loses retrieval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from vllm_quest.tune.samples import Sample

__all__ = ["ProbeError", "default_texts", "read_texts", "recall_samples", "text_samples", "without_blank"]

LEAD_TOKENS, ANSWER_TOKENS = 16, 64  # of a passage
PASSAGES = 6  # per text
QUERIES = 10  # per list
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


class ProbeError(ValueError):
    """A text cannot be used; says which and why."""


def default_texts() -> dict[str, str]:
    """Prose and code that every Python brings along: its language reference, and a long module."""
    import argparse
    from pydoc_data.topics import topics

    return {
        "Python's language reference": "\n".join(topics[name] for name in sorted(topics)),
        "Python's argparse module": Path(argparse.__file__).read_text(encoding="utf-8"),
    }


def read_texts(paths: Sequence[Path]) -> dict[str, str]:
    """The user's own.

    Raises:
        ProbeError: A file cannot be read.
    """
    texts = {}
    for path in paths:
        try:
            texts[str(path)] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ProbeError(f"--texts: cannot read {path}: {error}") from error
    return texts


def text_samples(tokenizer: Any, texts: dict[str, str], context: int) -> list[Sample]:
    """Six passages of each text from what follows its first `context` tokens.

    Raises:
        ProbeError: A text is too short.
    """
    samples = []
    needed = context + PASSAGES * (LEAD_TOKENS + ANSWER_TOKENS)
    for name, text in texts.items():
        tokens = tuple(tokenizer.encode(text))
        if len(tokens) < needed:
            raise ProbeError(
                f"{name} has {len(tokens)} tokens; allowed: at least {needed} at --context {context}"
            )
        for start in range(context, needed, LEAD_TOKENS + ANSWER_TOKENS):
            middle = start + LEAD_TOKENS
            samples.append(
                Sample(
                    task="text",
                    context_id=name,
                    context=tokens[:context],
                    question=tokens[start:middle],
                    answer=tokens[middle : middle + ANSWER_TOKENS],
                )
            )
    return samples


def recall_samples(tokenizer: Any, context: int, lists: int = 2) -> list[Sample]:
    """Ten questions about each of `lists` lists of invented names and numbers, over all depths."""
    samples = []
    for number in range(lists):
        rng = Random(number)
        tokens = list(tokenizer.encode(""))
        entries: list[tuple[str, str]] = []
        while len(tokens) < context:
            name, value = "".join(rng.choices(SYLLABLES, k=4)), str(rng.randrange(1_000, 10_000))
            entries.append((name, value))
            tokens += _encode(tokenizer, f"{name}: {value}\n")
        inside = len(entries) - 1  # the last one is cut
        for query in range(QUERIES):
            name, value = entries[rng.randrange(query * inside // QUERIES, (query + 1) * inside // QUERIES)]
            sample = Sample(
                task="recall",
                context_id=f"list {number}",
                context=tuple(tokens[:context]),
                question=_encode(tokenizer, f"\n\n{name}:"),
                answer=_encode(tokenizer, f" {value}"),
            )
            samples.append(without_blank(tokenizer, sample))
    return samples


def without_blank(tokenizer: Any, sample: Sample) -> Sample:
    """Its question ends with the answer's first blank, where that is a token of its own: it is no recall."""
    blank = _encode(tokenizer, " ")
    if sample.answer[: len(blank)] != blank:
        return sample
    return replace(sample, question=sample.question + blank, answer=sample.answer[len(blank) :])


def _encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))
