"""Code completion on the standard library's source: the name of a function that is defined far above.

The context ends somewhere in a long module; the question is a piece of code from further down that calls a
function defined in the context, cut before the name. Distractors are other functions of the context.
"""

from __future__ import annotations

import re
from random import Random
from typing import Any

from benchmarks.accuracy.samples import Sample
from benchmarks.accuracy.tasks.prompt import TaskError, collect, context_room, encode, plain_frame
from benchmarks.accuracy.tasks.text import Module, modules

TASK = "code_completion"
QUESTIONS = 5
DISTRACTORS = 4
QUESTION_CHARS = 200
MODULE_CHARS = 40_000  # shorter modules are not asked about, they fill up contexts
SHARE_ABOVE = 0.5  # of a module's text that is in the context
DEFINITION = re.compile(r"^ *(?:async )?def (\w{6,})\(", re.MULTILINE)
CALL = re.compile(r"(?<!def )(?<!class )(?<![\w\"'])(\w{6,})\(")


def samples(tokenizer: Any, context_tokens: int, count: int, seed: int) -> list[Sample]:
    """Five calls per context; answers are names of functions."""
    frame = plain_frame(tokenizer)
    room = context_room(context_tokens, frame)
    order = [module for module in modules() if len(module.source) >= MODULE_CHARS]
    Random(f"{TASK}-{seed}").shuffle(order)
    asked = iter(order)

    def one_context(context_id: str, rng: Random) -> list[Sample]:
        for module in asked:
            above, below = _halves(module)
            tokens = _last(tokenizer, above, room, rng)
            text = tokenizer.decode(tokens)
            names = sorted(set(DEFINITION.findall(text)))
            calls = _calls(below, names)
            if len(names) > DISTRACTORS and len(calls) >= QUESTIONS:
                return [
                    _sample(tokenizer, context_id, (*frame.head, *tokens), code, name, names, rng)
                    for code, name in rng.sample(calls, QUESTIONS)
                ]
        raise TaskError(
            f"{TASK}: the standard library has no further module for {count} samples; allowed: fewer"
        )

    return collect(count, seed, TASK, one_context)


def _halves(module: Module) -> tuple[str, str]:
    """The module's text above and below a line in its middle."""
    middle = module.source.index("\n", int(SHARE_ABOVE * len(module.source))) + 1
    return module.source[:middle], module.source[middle:]


def _last(tokenizer: Any, text: str, room: int, rng: Random) -> tuple[int, ...]:
    """The last `room` tokens of `text`, after other modules where it is shorter."""
    tokens = encode(tokenizer, text)
    others = [module.source for module in modules() if len(module.source) < MODULE_CHARS]
    rng.shuffle(others)
    while len(tokens) < room and others:
        tokens = (*encode(tokenizer, others.pop() + "\n\n"), *tokens)
    if len(tokens) < room:
        raise TaskError(f"{TASK}: {room} tokens of context are more than there is source; allowed: less")
    return tokens[-room:]


def _calls(code: str, names: list[str]) -> list[tuple[str, str]]:
    """Pieces of code that end where one of `names` is called, and that name; once per name."""
    found: dict[str, str] = {}
    for call in CALL.finditer(code):
        start = code.find("\n", max(0, call.start() - QUESTION_CHARS)) + 1
        before = code[start : call.start()]
        if call[1] in names and call[1] not in before and len(before) > 20:
            found.setdefault(call[1], before)
    return [(before, name) for name, before in found.items()]


def _sample(
    tokenizer: Any,
    context_id: str,
    context: tuple[int, ...],
    code: str,
    name: str,
    names: list[str],
    rng: Random,
) -> Sample:
    others = rng.sample([other for other in names if other != name], DISTRACTORS)
    question, answer = _split(tokenizer, code, name)
    return Sample(
        task=TASK,
        context_id=context_id,
        context=context,
        question=question,
        answer=answer,
        distractors=tuple(_split(tokenizer, code, other)[1] for other in others),
    )


def _split(tokenizer: Any, code: str, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens of `code` and of the call of `name` that follows; a space belongs to the word after it."""
    space = " " if code.endswith(" ") else ""
    return encode(tokenizer, code.removesuffix(" ")), encode(tokenizer, f"{space}{name}(")
