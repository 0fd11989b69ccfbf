"""From text to token ids of exact length: what a task's contexts and questions are put together with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from benchmarks.accuracy.samples import Sample
from benchmarks.accuracy.tasks.text import chapters

QUESTION_ROOM = 128  # a block of vLLM's on CPUs, so that a context ends with a block and is cached whole
CHAT_MARK = "\x00"


class TaskError(ValueError):
    """A task cannot be built as asked; says which one and what is allowed."""


@dataclass(frozen=True)
class Frame:
    """What is around a user's text in a conversation.

    Attributes:
        head: Token ids before the text.
        tail: What is between the text and the model's answer.
    """

    head: tuple[int, ...]
    tail: str


def encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Token ids of `text` alone, no special tokens added."""
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def plain_frame(tokenizer: Any) -> Frame:
    """No conversation: only what the tokenizer puts before every text."""
    return Frame(tuple(tokenizer.encode("")), "")


def chat_frame(tokenizer: Any) -> Frame:
    """The tokenizer's chat template; no conversation if it has none."""
    if not getattr(tokenizer, "chat_template", None):
        return plain_frame(tokenizer)
    messages = [{"role": "user", "content": CHAT_MARK}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    head, _, tail = text.partition(CHAT_MARK)
    return Frame(encode(tokenizer, head), tail)


def context_room(context_tokens: int, frame: Frame) -> int:
    """Tokens of text that a context holds in addition to what the frame puts before it."""
    return context_tokens - QUESTION_ROOM - len(frame.head)


def fill(tokenizer: Any, parts: Iterable[str], room: int) -> tuple[tuple[int, ...], int]:
    """The first `room` tokens of `parts`, and how many parts are in them from end to end.

    Raises:
        TaskError: The parts are too short.
    """
    tokens: list[int] = []
    whole = -1
    for part in parts:
        whole += 1
        if len(tokens) >= room:
            break
        tokens += encode(tokenizer, part)
    if len(tokens) < room:
        raise TaskError(
            f"{room} tokens of context asked for, {len(tokens)} are there; allowed: at most as many"
        )
    return tuple(tokens[:room]), whole


def prose(rng: Random) -> list[str]:
    """The language reference's paragraphs, chapters in random order."""
    order = list(chapters())
    rng.shuffle(order)
    return [f"{paragraph}\n\n" for chapter in order for paragraph in (chapter.title, *chapter.paragraphs)]


def plant(tokenizer: Any, facts: Sequence[str], room: int, rng: Random) -> list[int]:
    """Exactly `room` tokens of prose with every fact in it as a paragraph of its own.

    Fact i of n is somewhere in the i-th of n equal parts, so that facts cover all depths.
    """
    planted = [encode(tokenizer, f"{fact}\n\n") for fact in facts]
    total = room - sum(map(len, planted))
    if total < room // 2:
        raise TaskError(
            f"{len(facts)} facts fill more than half of {room} tokens of context; allowed: longer"
        )
    depths = [(number + rng.random()) / len(facts) * total for number in range(len(facts))]
    tokens: list[int] = []
    prose_tokens = 0
    for paragraph in prose(rng):
        while depths and depths[0] <= prose_tokens:
            tokens += planted[len(planted) - len(depths)]
            depths.pop(0)
        piece = encode(tokenizer, paragraph)[: total - prose_tokens]
        prose_tokens += len(piece)
        tokens += piece
        if prose_tokens == total:
            break
    for fact in planted[len(planted) - len(depths) :]:  # a last paragraph longer than a part
        tokens += fact
    if len(tokens) < room:
        raise TaskError(f"{room} tokens of context are more than the language reference has; allowed: less")
    return tokens


def spread(count: int, total: int, rng: Random) -> list[int]:
    """`count` of the numbers below `total`: one from each of equal parts, so that they cover all depths.

    Raises:
        TaskError: There are fewer.
    """
    if total < count:
        raise TaskError(f"a context holds {total} documents or lines, {count} are asked for; allowed: longer")
    return [rng.randrange(part * total // count, (part + 1) * total // count) for part in range(count)]


def collect(
    count: int, seed: int, task: str, one_context: Callable[[str, Random], list[Sample]]
) -> list[Sample]:
    """The first `count` samples of as many contexts as it takes.

    Args:
        one_context: Builds all samples of the context with that identifier; deterministic in the generator.
    """
    samples: list[Sample] = []
    while len(samples) < count:
        context_id = f"{task}-{seed}-{len({sample.context_id for sample in samples})}"
        samples += one_context(context_id, Random(context_id))
    return samples[:count]
