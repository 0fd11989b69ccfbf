"""Few-shot classification: what is it that is named, as hundreds of labelled examples show."""

from __future__ import annotations

from random import Random
from typing import Any

from benchmarks.accuracy.samples import Sample
from benchmarks.accuracy.tasks.names import ANIMALS, CITIES, COLOURS, FIRST_NAMES, LAST_NAMES, OBJECTS
from benchmarks.accuracy.tasks.prompt import collect, context_room, encode, fill, plain_frame

TASK = "few_shot"
QUESTIONS = 10
KINDS = {  # everything of a kind: one of the first with one of the second
    "person": (FIRST_NAMES, LAST_NAMES),
    "animal": (COLOURS, ANIMALS),
    "place": (CITIES, OBJECTS),
    "year": (tuple(map(str, range(10, 21))), tuple(map(str, range(10, 100)))),
}


def samples(tokenizer: Any, context_tokens: int, count: int, seed: int) -> list[Sample]:
    """Ten questions per context; answers are kinds, the other kinds are the distractors."""
    frame = plain_frame(tokenizer)

    def one_context(context_id: str, rng: Random) -> list[Sample]:
        named = [(name, kind) for kind in KINDS for name in _names(kind)]
        rng.shuffle(named)
        asked = named[:QUESTIONS]
        examples = [f"{name} is a {kind}\n" for name, kind in named[QUESTIONS:]]
        tokens, _ = fill(tokenizer, examples, context_room(context_tokens, frame))
        return [
            Sample(
                task=TASK,
                context_id=context_id,
                context=(*frame.head, *tokens),
                question=encode(tokenizer, f"\n{name} is a"),
                answer=encode(tokenizer, f" {kind}"),
                distractors=tuple(encode(tokenizer, f" {other}") for other in KINDS if other != kind),
            )
            for name, kind in asked
        ]

    return collect(count, seed, TASK, one_context)


def _names(kind: str) -> list[str]:
    """All names of a kind."""
    joint = {"year": "", "person": " ", "animal": " ", "place": " "}[kind]
    return [f"{first}{joint}{second}" for first in KINDS[kind][0] for second in KINDS[kind][1]]
