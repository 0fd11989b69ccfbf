"""Running ``vllm-quest batch`` as a user does, and looking at its processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from benchmarks.engine.server import own_environment

ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 1 << 28,
}
QUEST = {"token_budget": 48, "dense_layers": 0}


def command(source: Path, output: Path, model: str, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "vllm_quest.cli", "batch", str(source), str(output), "--model", model),
        *("--served-model-name", "small", "--engine", json.dumps(ENGINE), "--quest", json.dumps(QUEST)),
        *("--batch-size", "8", *more),
    ]


def start(arguments: list[str], log: Path, **variables: str) -> subprocess.Popen:
    """Starts a command with `variables` in its environment; what it prints goes to `log`."""
    with log.open("a") as file:
        return subprocess.Popen(arguments, stdout=file, stderr=file, env=own_environment() | variables)


def processes(driver: subprocess.Popen) -> list[psutil.Process]:
    """All processes under `driver`: Ray's, and the engines'."""
    try:
        return psutil.Process(driver.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def engines(driver: subprocess.Popen) -> set[int]:
    """Pids of Ray's workers that hold an engine."""
    return {process.pid for process in processes(driver) if "vLLMEngineStageUDF" in _title(process)}


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def wait_for(what: Callable[[], object], driver: subprocess.Popen, log: Path, seconds: float = 400) -> None:
    """Waits until `what` is true; fails with the log if the driver ends before."""
    deadline = time.monotonic() + seconds
    while not what():
        if driver.poll() is not None or time.monotonic() > deadline:
            driver.kill()
            pytest.fail(f"the command did not come so far:\n{log.read_text()[-3000:]}")
        time.sleep(0.05)


def finish(driver: subprocess.Popen, log: Path, seconds: float = 400) -> None:
    """Waits until the command succeeds."""
    try:
        status = driver.wait(seconds)
    except subprocess.TimeoutExpired:
        driver.terminate()
        status = "a timeout"
    assert status == 0, f"it ended with {status}:\n{log.read_text()[-3000:]}"


def assert_gone(found: list[psutil.Process], but: tuple[str, ...] = ()) -> None:
    """None of the processes is left, those with a name in `but` left aside."""
    _, alive = psutil.wait_procs(found, timeout=60)
    left = [_title(process).strip() for process in alive]
    assert not [title for title in left if title not in but]


def records(output: Path) -> list[dict]:
    files = sorted(output.glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]
