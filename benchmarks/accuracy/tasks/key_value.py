"""Recall of one line out of a long list of keys and values: nothing but the right page helps."""

from __future__ import annotations

from random import Random
from typing import Any

from benchmarks.accuracy.samples import Sample
from benchmarks.accuracy.tasks.prompt import collect, context_room, encode, fill, plain_frame, spread
from benchmarks.accuracy.tasks.text import words

TASK = "key_value"
QUESTIONS = 10
DISTRACTORS = 4


def samples(tokenizer: Any, context_tokens: int, count: int, seed: int) -> list[Sample]:
    """Ten questions per context, evenly spread over its depth; answers are four digits."""
    frame = plain_frame(tokenizer)

    def one_context(context_id: str, rng: Random) -> list[Sample]:
        keys = rng.sample(words(), len(words()))
        values = rng.sample(range(1_000, 10_000), len(keys))
        lines = [f"{key}: {value}\n" for key, value in zip(keys, values, strict=True)]
        tokens, inside = fill(tokenizer, lines, context_room(context_tokens, frame))
        asked = spread(QUESTIONS, inside, rng)
        return [
            Sample(
                task=TASK,
                context_id=context_id,
                context=(*frame.head, *tokens),
                question=encode(tokenizer, f"\n\n{keys[index]}:"),
                answer=encode(tokenizer, f" {values[index]}"),
                distractors=tuple(
                    encode(tokenizer, f" {values[other]}")
                    for other in rng.sample([line for line in range(inside) if line != index], DISTRACTORS)
                ),
            )
            for index in asked
        ]

    return collect(count, seed, TASK, one_context)
