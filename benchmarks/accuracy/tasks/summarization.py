"""Summaries of one of many documents, scored by the held reference's log-probability and by ROUGE-L.

As in XSum the reference is what the document itself begins with, taken out of the text. Documents are
descriptions of modules of Python's standard library, from their docstrings.
"""

from __future__ import annotations

from random import Random
from typing import Any

from benchmarks.accuracy.samples import Sample
from benchmarks.accuracy.tasks.prompt import chat_frame, collect, context_room, encode, fill, spread
from benchmarks.accuracy.tasks.text import described_modules

TASK = "summarization"
QUESTIONS = 5
GENERATED_TOKENS = 32


def samples(tokenizer: Any, context_tokens: int, count: int, seed: int) -> list[Sample]:
    """Five documents per context; answers are their summaries. Generates a text to score by ROUGE-L."""
    frame = chat_frame(tokenizer)

    def one_context(context_id: str, rng: Random) -> list[Sample]:
        documents = list(described_modules())
        rng.shuffle(documents)
        texts = [f"Document: {document.name}\n{document.description}\n\n" for document in documents]
        tokens, whole = fill(tokenizer, texts, context_room(context_tokens, frame))
        asked = spread(QUESTIONS, whole, rng)
        return [
            Sample(
                task=TASK,
                context_id=context_id,
                context=(*frame.head, *tokens),
                question=encode(
                    tokenizer,
                    f"\n\nSummarize the document {documents[index].name} in one sentence."
                    f"{frame.tail}Summary of {documents[index].name}:",
                ),
                answer=encode(tokenizer, f" {documents[index].summary}"),
                generate=GENERATED_TOKENS,
            )
            for index in asked
        ]

    return collect(count, seed, TASK, one_context)


def rouge_l(reference: str, generated: str) -> float:
    """ROUGE-L, F1 over stems, 0 to 1: how much of the reference's order of words the first line has."""
    from rouge_score.rouge_scorer import RougeScorer

    first_line = generated.strip().partition("\n")[0]
    return RougeScorer(["rougeL"], use_stemmer=True).score(reference, first_line)["rougeL"].fmeasure
