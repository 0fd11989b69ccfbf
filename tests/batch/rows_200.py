"""200 rows of every kind, 10 of them bad."""

from __future__ import annotations

import json

ROWS = 200
TOKENS = 8
# What is wrong with a row, and a word of the reason.
BAD: list[tuple[bytes, str]] = [
    (b"no JSON at all", "not JSON"),
    (b'{"custom_id": "bad-1"}', "either messages or prompt"),
    (json.dumps({"custom_id": "bad-2", "prompt": "word " * 2000}).encode(), "maximum context length"),
    (b'{"custom_id": "bad-3", "prompt": "x", "temperature": -1}', "temperature"),
    (b'{"custom_id": "bad-4", "prompt": "x", "max_tokens": "many"}', "max_tokens"),
    (b"[1, 2]", "an object"),
    (b'{"custom_id": "bad-6", "prompt": "x", "model": "other"}', "'small'"),
    (b'{"custom_id": "bad-7", "prompt": "x", "n": 2}', "n: only 1"),
    (b'{"custom_id": "bad-8", "method": "POST", "url": "/v1/embeddings", "body": {"input": "x"}}', "url"),
    (b'{"custom_id": "bad-9", "prompt": "\xff"}', "not JSON"),
]


def bad_lines() -> dict[int, tuple[bytes, str]]:
    """The bad rows by line number, spread over the file."""
    return {3 + 20 * index: bad for index, bad in enumerate(BAD)}


def good_line(number: int) -> bytes:
    """A row of one of three kinds; every fifth has the name of another row."""
    messages = [{"role": "user", "content": f"Count from {number} to {number + 9}."}]
    if number % 3 == 0:
        row = {"prompt": f"{number}, {number + 1}, ", "max_tokens": TOKENS, "seed": number, "logprobs": 1}
    elif number % 3 == 1:
        row = {"messages": messages, "max_tokens": TOKENS, "temperature": 0, "stop": "zzz"}
    else:
        body = {"model": "small", "messages": messages, "max_completion_tokens": TOKENS, "temperature": 0}
        row = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps({"custom_id": "twice" if number % 5 == 0 else f"row-{number}"} | row).encode()


def text() -> bytes:
    """The file."""
    bad = bad_lines()
    lines = [bad[number][0] if number in bad else good_line(number) for number in range(1, ROWS + 1)]
    return b"\n".join(lines) + b"\n"
