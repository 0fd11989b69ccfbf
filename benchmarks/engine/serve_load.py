"""Load for a server: short chats next to long documents, sent by ``vllm bench serve``."""

from __future__ import annotations

import asyncio
import json
import random
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from vllm_quest.config import QuestConfig

CHARS_PER_TOKEN = 4  # of English prose, roughly; the tokens that were sent are counted, not this
CHAT = "In one paragraph: what is the Python topic '{}' about, and what would a beginner get wrong about it?"


@dataclass(frozen=True)
class Load:
    """One request mix.

    Attributes:
        requests: How many are sent.
        long_share: The share of them that bring a document.
        long_tokens: Tokens of a document, about.
        output_tokens: Tokens of every answer.
        rate: Requests per second, as a Poisson process.
        goodput: What counts as served well, as ``vllm bench serve --goodput`` has it.
    """

    requests: int
    long_share: float
    long_tokens: int
    output_tokens: int
    rate: float
    goodput: tuple[str, ...]


def write_prompts(path: Path, load: Load, seed: int) -> None:
    """Writes the requests as JSON lines; no two share a beginning, so that no prefix is cached."""
    draw = random.Random(seed)
    names = sorted(topics)
    text = "\n".join(topics[name] for name in names)
    size = load.long_tokens * CHARS_PER_TOKEN
    long = round(load.requests * load.long_share)
    kinds = [True] * long + [False] * (load.requests - long)
    draw.shuffle(kinds)
    with path.open("w") as lines:
        for number, is_long in enumerate(kinds):
            prompt = f"Request {seed}-{number}. {CHAT.format(draw.choice(names))}"
            if is_long:
                start = draw.randrange(len(text) - size)
                prompt = f"Request {seed}-{number}. {text[start : start + size]}\n\nSummarize this text."
            lines.write(json.dumps({"prompt": prompt, "output_tokens": load.output_tokens}) + "\n")


def send(address: str, model: str, prompts: Path, load: Load, seed: int, limit_s: float) -> dict[str, Any]:
    """Runs ``vllm bench serve`` and returns what it reports, per-request lengths included.

    Raises:
        TimeoutError: It took longer than `limit_s`.
    """
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    arguments = parser.parse_args(
        [
            *("--base-url", address, "--model", model, "--seed", str(seed)),
            *("--dataset-name", "custom", "--dataset-path", str(prompts), "--disable-shuffle"),
            *("--num-prompts", str(load.requests), "--request-rate", str(load.rate)),
            *("--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "50,99"),
            *("--ignore-eos", "--temperature", "0", "--save-detailed", "--disable-tqdm"),
            *("--goodput", *load.goodput),
        ]
    )
    with redirect_stdout(StringIO()):
        return asyncio.run(asyncio.wait_for(main_async(arguments), limit_s))


def sparse_rows(input_lens: list[int], output_lens: list[int], config: QuestConfig) -> int:
    """Decode rows per sparse layer whose context exceeds the budget: what the counter must grow by.

    The first token of an answer comes from prefill; row i of the others sees the prompt and i tokens.
    """
    if config.token_budget is None:
        return 0
    return sum(
        context > config.token_budget and context >= config.min_context
        for prompt, output in zip(input_lens, output_lens, strict=True)
        for context in range(prompt + 1, prompt + output)
    )
