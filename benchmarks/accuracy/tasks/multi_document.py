"""Questions whose answer is in one of many documents.

The documents are descriptions of modules of Python's standard library, from their docstrings. Every one has
an invented number in an archive, which a question asks for; other documents' numbers are the distractors.
"""

from __future__ import annotations

from random import Random
from typing import Any

from benchmarks.accuracy.samples import Sample
from benchmarks.accuracy.tasks.prompt import chat_frame, collect, context_room, encode, fill, spread
from benchmarks.accuracy.tasks.text import described_modules

TASK = "multi_document_qa"
QUESTIONS = 5
DISTRACTORS = 4


def samples(tokenizer: Any, context_tokens: int, count: int, seed: int) -> list[Sample]:
    """Five questions per context; answers are four digits."""
    frame = chat_frame(tokenizer)

    def one_context(context_id: str, rng: Random) -> list[Sample]:
        documents = list(described_modules())
        rng.shuffle(documents)
        numbers = rng.sample(range(1_000, 10_000), len(documents))
        texts = [
            f"Document: {document.name}\nArchive number: {number}\n{document.description}\n\n"
            for document, number in zip(documents, numbers, strict=True)
        ]
        tokens, whole = fill(tokenizer, texts, context_room(context_tokens, frame))
        asked = spread(QUESTIONS, whole, rng)
        return [
            Sample(
                task=TASK,
                context_id=context_id,
                context=(*frame.head, *tokens),
                question=encode(
                    tokenizer,
                    f"\n\nQuestion: What is the archive number of {documents[index].name}?{frame.tail}"
                    f"Document: {documents[index].name}\nArchive number:",
                ),
                answer=encode(tokenizer, f" {numbers[index]}"),
                distractors=tuple(
                    encode(tokenizer, f" {numbers[other]}")
                    for other in rng.sample([other for other in range(whole) if other != index], DISTRACTORS)
                ),
            )
            for index in asked
        ]

    return collect(count, seed, TASK, one_context)
