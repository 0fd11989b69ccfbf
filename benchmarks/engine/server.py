"""vLLM's OpenAI server on loopback, in processes of its own, for as long as a caller wants it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vllm_quest.metrics import DIRECTORY_VARIABLE

START_SECONDS, STOP_SECONDS = 240, 60


class ServerError(RuntimeError):
    """The server did not come up; has the end of its log."""


def own_environment() -> dict[str, str]:
    """This process's environment without what an engine in this process has put there for itself."""
    ours = {DIRECTORY_VARIABLE, "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_WORKER_MULTIPROC_METHOD"}
    return {name: value for name, value in os.environ.items() if name not in ours}


class Server:
    """A running server.

    Attributes:
        address: ``http://127.0.0.1:port``.
        process: The API server's.
    """

    def __init__(self, address: str, process: subprocess.Popen) -> None:
        self.address, self.process = address, process

    def metric(self, name: str) -> float:
        """Sum of the samples at ``/metrics`` whose name and labels begin with `name`."""
        text = urllib.request.urlopen(f"{self.address}/metrics", timeout=10).read().decode()
        found = re.findall(rf"^{re.escape(name)}\S* (\S+)$", text, re.MULTILINE)
        return sum(float(value) for value in found)


@contextmanager
def running_server(arguments: Sequence[str], log_file: Path) -> Iterator[Server]:
    """Starts ``vllm serve`` with `arguments` at a free port, and ends it.

    Raises:
        ServerError: It ended or did not answer in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--host", "127.0.0.1", "--port", str(port)),
        # Without time for it vLLM kills its engine at shutdown, and may log that the engine died.
        *("--shutdown-timeout", "30"),
        *arguments,
    ]
    with log_file.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=own_environment())
    server = Server(f"http://127.0.0.1:{port}", process)
    try:
        _wait_until_healthy(server, log_file)
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_until_healthy(server: Server, log_file: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            urllib.request.urlopen(f"{server.address}/health", timeout=5)
            return
        except OSError:
            time.sleep(1)
    raise ServerError(f"the server did not come up:\n{log_file.read_text()[-3000:]}")
