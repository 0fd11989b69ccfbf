"""Real prose, continued: what language modelling loses. On every model, in addition to the six categories."""

from __future__ import annotations

from random import Random
from typing import Any

from benchmarks.accuracy.samples import Sample
from benchmarks.accuracy.tasks.prompt import collect, context_room, fill, plain_frame, prose

TASK = "prose"
QUESTIONS = 5
LEAD_TOKENS = 24
ANSWER_TOKENS = 64


def samples(tokenizer: Any, context_tokens: int, count: int, seed: int) -> list[Sample]:
    """Five passages from what follows each context; answers are their last 64 tokens."""
    frame = plain_frame(tokenizer)
    passage = LEAD_TOKENS + ANSWER_TOKENS

    def one_context(context_id: str, rng: Random) -> list[Sample]:
        room = context_room(context_tokens, frame)
        tokens, _ = fill(tokenizer, prose(rng), room + QUESTIONS * passage)
        starts = range(room, len(tokens), passage)
        return [
            Sample(
                task=TASK,
                context_id=context_id,
                context=(*frame.head, *tokens[:room]),
                question=tokens[start : start + LEAD_TOKENS],
                answer=tokens[start + LEAD_TOKENS : start + passage],
            )
            for start in starts
        ]

    return collect(count, seed, TASK, one_context)
