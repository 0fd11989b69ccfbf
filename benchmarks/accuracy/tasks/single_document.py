"""Questions about one long document: facts about invented people, planted in a real one."""

from __future__ import annotations

from random import Random
from typing import Any

from benchmarks.accuracy.samples import Sample
from benchmarks.accuracy.tasks.names import CITIES, FIRST_NAMES, LAST_NAMES
from benchmarks.accuracy.tasks.prompt import chat_frame, collect, context_room, encode, plant

TASK = "single_document_qa"
DISTRACTORS = 4
# What is said, what is asked, how the answer begins; each about another role, so that facts do not compete.
PEOPLE = (
    ("The editor of this text is {}.", "Who is the editor of this text?", "The editor of this text is"),
    ("The text was translated by {}.", "Who translated the text?", "The text was translated by"),
    ("The drawings were made by {}.", "Who made the drawings?", "The drawings were made by"),
)
PLACES = (
    ("The text was first printed in {}.", "Where was it first printed?", "The text was first printed in"),
    ("The next conference is held in {}.", "Where is the next conference?", "The next conference is held in"),
)


def samples(tokenizer: Any, context_tokens: int, count: int, seed: int) -> list[Sample]:
    """Five questions per context; answers are names of people and cities."""
    frame = chat_frame(tokenizer)

    def one_context(context_id: str, rng: Random) -> list[Sample]:
        people = [
            f"{first} {last}"
            for first, last in zip(
                rng.sample(FIRST_NAMES, len(PEOPLE) + DISTRACTORS),
                rng.sample(LAST_NAMES, len(PEOPLE) + DISTRACTORS),
                strict=True,
            )
        ]
        cities = rng.sample(CITIES, len(PLACES) + DISTRACTORS)
        asked = [(*fact, person, people) for fact, person in zip(PEOPLE, people, strict=False)]
        asked += [(*fact, city, cities) for fact, city in zip(PLACES, cities, strict=False)]
        rng.shuffle(asked)
        facts = [statement.format(value) for statement, _, _, value, _ in asked]
        room = context_room(context_tokens, frame)
        context = (*frame.head, *plant(tokenizer, facts, room, rng))
        return [
            Sample(
                task=TASK,
                context_id=context_id,
                context=context,
                question=encode(tokenizer, f"\n\nQuestion: {question}{frame.tail}{lead}"),
                answer=encode(tokenizer, f" {value}"),
                distractors=tuple(encode(tokenizer, f" {other}") for other in pool if other != value)[
                    :DISTRACTORS
                ],
            )
            for _, question, lead, value, pool in asked
        ]

    return collect(count, seed, TASK, one_context)
