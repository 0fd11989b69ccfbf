"""A real OpenAI server on loopback with QUEST, its engine in processes of its own."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from benchmarks.engine.server import Server, running_server

pytestmark = pytest.mark.engine

NAME = "smollm2"
QUEST = {"token_budget": 256}


@pytest.fixture(scope="module")
def log_file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("server") / "log"


@pytest.fixture(scope="module")
def server(model, log_file) -> Iterator[Server]:
    arguments = [
        *("--model", model, "--served-model-name", NAME),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "8"),
        *("--kv-cache-memory-bytes", str(1 << 29)),
        *("--attention-backend", "QUEST"),
        *("--additional-config", json.dumps({"quest": QUEST})),
    ]
    with running_server(arguments, log_file) as started:
        yield started


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", timeout=120, max_retries=0)


def counter(server: Server, name: str) -> float:
    return server.metric(f"vllm_quest:{name}")


def test_the_start_up_line_says_what_is_sparse(server, log_file) -> None:
    lines = [line for line in log_file.read_text().splitlines() if "QUEST: layers" in line]
    assert len(lines) == 1
    assert "layers 0-29 sparse; no layer dense" in lines[0]
    assert "256 tokens = 32 pages of 8" in lines[0]


def test_long_context_is_decoded_sparsely_and_counted(server, client, prose) -> None:
    rows, pages = counter(server, 'decode_rows_total{mode="sparse"'), counter(server, "pages_read_total")
    answer = client.completions.create(model=NAME, prompt=prose[:900], max_tokens=9, temperature=0)
    assert answer.usage.completion_tokens == 9
    assert counter(server, 'decode_rows_total{mode="sparse"') - rows == 8 * 30
    assert counter(server, "pages_read_total") - pages == 8 * 30 * 3 * 32
    assert server.metric("vllm:generation_tokens_total") >= 9


def test_streaming_equals_not_streaming(client, prose) -> None:
    request = {"model": NAME, "prompt": prose[:700], "max_tokens": 20, "temperature": 0}
    whole = client.completions.create(**request).choices[0].text
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**request, stream=True)]
    assert len(pieces) > 5
    assert "".join(pieces) == whole


def test_eight_at_once_answer_as_alone(server, client, prose) -> None:
    prompts = [
        prose[i * 300 : i * 300 + length] for i, length in enumerate([5, 900, 63, 400, 577, 17, 1200, 300])
    ]

    async def ask_all() -> list[str]:
        base_url = f"{server.address}/v1"
        async with openai.AsyncOpenAI(base_url=base_url, api_key="none", timeout=240) as parallel:
            requests = [
                parallel.completions.create(model=NAME, prompt=prompt, max_tokens=12, temperature=0)
                for prompt in prompts
            ]
            return [answer.choices[0].text for answer in await asyncio.gather(*requests)]

    together = asyncio.run(ask_all())
    alone = [
        client.completions.create(model=NAME, prompt=prompt, max_tokens=12, temperature=0).choices[0].text
        for prompt in prompts
    ]
    assert together == alone


def test_chat(client) -> None:
    answer = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=16,
        temperature=0,
    )
    assert "Paris" in answer.choices[0].message.content


def test_bad_requests_are_refused_and_the_server_lives_on(client, prose) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model=NAME, prompt="hi", temperature=-3)
    with pytest.raises(openai.BadRequestError, match="2048"):
        client.completions.create(model=NAME, prompt=prose[:2100], max_tokens=4)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="hi")
    assert client.completions.create(model=NAME, prompt="hi", max_tokens=2).choices[0].text


def test_shutdown_is_clean(server, log_file) -> None:
    """Runs last: it ends the server. The engine and its workers end by themselves and without an error.

    vLLM's API server may log that its engine is gone (EngineDeadError): it races with its own shutdown.
    """
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) in (0, -signal.SIGTERM)
    log = log_file.read_text()
    assert "all workers exited gracefully" in log
    assert "Application shutdown complete" in log
    tracebacks = [line for line in log.splitlines() if "Traceback" in line]
    assert all(line.startswith("(APIServer") for line in tracebacks)
    assert len(tracebacks) == log.count("vllm.v1.engine.exceptions.EngineDeadError: ")
