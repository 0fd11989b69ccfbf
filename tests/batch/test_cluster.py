"""What a cluster must offer, and engines of two workers on it."""

from __future__ import annotations

import json
import re
import socket
import sys
import urllib.request
from pathlib import Path

import openai
import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.batch.running import ENGINE, QUEST, command, finish, records, start, wait_for
from vllm_quest.batch import cluster as machines
from vllm_quest.batch.cluster import ClusterError


@pytest.mark.parametrize(
    ("bundle", "replicas", "workers", "words"),
    [
        ({"CPU": 1, "GPU": 1}, 3, 1, "GPU: 3 needed, 2 there"),
        ({"CPU": 1, "GPU": 1}, 1, 4, "GPU: 4 needed, 2 there"),
        ({"CPU": 3}, 2, 1, "CPU: 8 needed, 6 there (2 CPUs are for the pipeline)"),
        ({"CPU": 1, "TPU": 1}, 1, 1, "TPU: 1 needed, 0 there"),
    ],
)
def test_what_cannot_be_placed_is_refused(cluster, bundle, replicas, workers, words) -> None:
    with pytest.raises(ClusterError) as error:
        machines.check_room(bundle, replicas, workers)
    assert words in str(error.value)
    assert f"--replicas {replicas} with {workers} worker(s) each" in str(error.value)


def test_what_fits_is_accepted(cluster) -> None:
    machines.check_room({"CPU": 1, "GPU": 1}, 2, 1)
    machines.check_room({"CPU": 1, "GPU": 1}, 1, 2)
    machines.check_room({"CPU": 2}, 2, 1)


def test_a_worker_that_fits_on_no_node_is_refused(cluster, monkeypatch) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}}] * 2
    monkeypatch.setattr(machines.ray, "nodes", lambda: nodes)
    machines.check_room({"CPU": 2, "GPU": 1}, 2, 1)
    with pytest.raises(ClusterError, match="CPU: 1, GPU: 2 on one node; 0 fit"):
        machines.check_room({"CPU": 1, "GPU": 2}, 1, 1)


def test_nothing_answers_at_an_address(tmp_path, model) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # not listening
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        (tmp_path / "rows.jsonl").write_text('{"prompt": "x"}\n')
        log = tmp_path / "log"
        driver = start(command(tmp_path / "rows.jsonl", tmp_path / "out", model, "--address", address), log)
        assert driver.wait(60) == 1
    assert f"--address {address}: nothing answers there" in log.read_text()


@pytest.fixture(scope="module")
def two_heads(model, tmp_path_factory) -> str:
    """A model of two KV heads, so that two workers can share it; SmolLM2 has three."""
    folder = tmp_path_factory.mktemp("two-heads")
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


PROMPTS = [[5 + (7 * i + 3 * j) % 900 for j in range(200 + i)] for i in range(6)]
SAMPLING = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}


def answers(cluster: str, model: str, folder: Path, workers: int) -> tuple[dict[str, str], dict[str, int]]:
    """The texts that an engine of so many workers gives, and QUEST's counters."""
    folder.mkdir()
    lines = [json.dumps({"prompt": prompt} | SAMPLING) for prompt in PROMPTS]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    more = ("--address", cluster, "--tensor-parallel-size", str(workers))
    log = folder / "log"
    finish(start(command(folder / "rows.jsonl", folder / "out", model, *more), log), log)
    (counters,) = json.loads((folder / "out" / "summary.json").read_text())["nodes"].values()
    found = records(folder / "out")
    return {one["id"]: one["response"]["body"]["choices"][0]["text"] for one in found}, counters


@pytest.fixture(scope="module")
def of_one_worker(cluster, two_heads, tmp_path_factory) -> tuple[dict[str, str], dict[str, int]]:
    return answers(cluster, two_heads, tmp_path_factory.mktemp("one") / "batch", workers=1)


@pytest.mark.engine
def test_two_workers_give_the_tokens_of_one_and_both_are_sparse(
    cluster, two_heads, of_one_worker, tmp_path
) -> None:
    """Tensor parallel, through vLLM's Ray executor."""
    texts, counters = answers(cluster, two_heads, tmp_path / "batch", workers=2)
    wanted, counters_of_one = of_one_worker
    assert len(wanted) == len(PROMPTS)
    assert texts == wanted
    # A row counts once per worker, a page once per KV head.
    rows = len(PROMPTS) * (SAMPLING["max_tokens"] - 1) * 3
    assert counters_of_one["decode_rows_sparse"] == rows
    assert counters["decode_rows_sparse"] == 2 * rows
    assert counters["pages_read"] == counters_of_one["pages_read"]


@pytest.mark.engine
def test_a_server_on_the_cluster(cluster, two_heads, of_one_worker, tmp_path) -> None:
    """``vllm serve --distributed-executor-backend ray``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", two_heads),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"),
        *("--kv-cache-memory-bytes", str(ENGINE["kv_cache_memory_bytes"]), "--shutdown-timeout", "30"),
        *("--tensor-parallel-size", "2", "--distributed-executor-backend", "ray"),
        *("--attention-backend", "QUEST", "--additional-config", json.dumps({"quest": QUEST})),
    ]
    log = tmp_path / "log"
    server = start(
        arguments, log, RAY_ADDRESS=cluster, VLLM_HOST_IP="127.0.0.1", QUEST_TEST_RAY_EXECUTOR_ON_CPU="1"
    )
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(lambda: is_healthy(address), server, log)
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=120)
        answer = client.completions.create(
            model=two_heads, prompt=PROMPTS[0], max_tokens=12, temperature=0, extra_body={"ignore_eos": True}
        )
        assert answer.choices[0].text == of_one_worker[0]["rows.jsonl:1"]
        text = urllib.request.urlopen(f"{address}/metrics", timeout=10).read().decode()
        (rows,) = re.findall(r'^vllm_quest:decode_rows_total{mode="sparse".* (\S+)$', text, re.MULTILINE)
        assert float(rows) == 2 * 11 * 3
    finally:
        server.terminate()
        server.wait(60)


def is_healthy(address: str) -> bool:
    try:
        return urllib.request.urlopen(f"{address}/health", timeout=5).status == 200
    except OSError:
        return False


def test_a_model_that_is_not_on_a_node(cluster, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x"}\n')
    log = tmp_path / "log"
    nowhere = "/nowhere/model"
    driver = start(command(tmp_path / "rows.jsonl", tmp_path / "out", nowhere, "--address", cluster), log)
    assert driver.wait(100) == 1
    assert "(127.0.0.1): the model /nowhere/model is not there" in log.read_text()
