"""What is measured: a question about a context, and the answer that decode should find."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Sample"]


@dataclass(frozen=True)
class Sample:
    """One question, in token ids of the model. The context is prefilled; question and answer are decoded.

    Attributes:
        task: Name of the task.
        context_id: Samples of equal `context_id` have the same `context`; its prefill is paid once.
        context: Token ids of the long text. Cheapest where its length is a multiple of vLLM's block size
            (128 on CPUs) and question and answer together are shorter than a block.
        question: Token ids that follow the context; at least one, and fed token by token.
        answer: Token ids of the right answer; at least one.
        distractors: Token ids of wrong answers that the right one is ranked among; may be empty.
        generate: Tokens to generate greedily after the question, for a score of the text; 0 for none.
    """

    task: str
    context_id: str
    context: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]
    distractors: tuple[tuple[int, ...], ...] = ()
    generate: int = 0
