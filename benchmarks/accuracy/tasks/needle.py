"""Notes hidden in prose at all depths, as the pass-key tests of QUEST and of LongBench's authors hide one.

A context hides one note of each kind, so that several questions share its prefill and no note competes with
another. Distractors are the answers of the other kinds.
"""

from __future__ import annotations

from random import Random
from typing import Any

from benchmarks.accuracy.samples import Sample
from benchmarks.accuracy.tasks.prompt import chat_frame, collect, context_room, encode, plant

TASK = "needle"
INTRO = "There are notes hidden in the text below. Find them and remember them.\n\n"
KINDS = (
    "The pass key of the safe is",
    "The phone number of the doctor is",
    "The serial number of the telescope is",
    "The price of the painting is",
    "The year of the shipwreck is",
)


def samples(tokenizer: Any, context_tokens: int, count: int, seed: int) -> list[Sample]:
    """Five questions per context; answers are five digits."""
    frame = chat_frame(tokenizer)
    intro = encode(tokenizer, INTRO)

    def one_context(context_id: str, rng: Random) -> list[Sample]:
        kinds = rng.sample(KINDS, len(KINDS))
        numbers = [str(number) for number in rng.sample(range(10_000, 100_000), len(KINDS))]
        notes = [
            f"Note: {kind} {number}. Remember it: {kind} {number}."
            for kind, number in zip(kinds, numbers, strict=True)
        ]
        room = context_room(context_tokens, frame) - len(intro)
        context = (*frame.head, *intro, *plant(tokenizer, notes, room, rng))
        return [
            Sample(
                task=TASK,
                context_id=context_id,
                context=context,
                question=encode(
                    tokenizer, f"\n\nQuestion: What is {kind[0].lower()}{kind[1:-3]}?{frame.tail}{kind}"
                ),
                answer=encode(tokenizer, f" {numbers[place]}"),
                distractors=tuple(
                    encode(tokenizer, f" {other}") for other in numbers if other != numbers[place]
                ),
            )
            for place, kind in enumerate(kinds)
        ]

    return collect(count, seed, TASK, one_context)
