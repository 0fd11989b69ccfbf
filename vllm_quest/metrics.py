"""Proof of activity: counters that the workers write and any process of the same vLLM instance can read.

Each worker owns one small file of int64 counters in a directory whose name it inherits through the
environment. Reading is adding up files, so the API server (Prometheus) and an offline caller
need no message to the workers.
"""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from prometheus_client.core import CounterMetricFamily

DIRECTORY_VARIABLE = "QUEST_METRICS_DIR"


class Counter(NamedTuple):
    """One counter: its key for `read_counters`, and how Prometheus knows it."""

    key: str
    metric: str
    labels: dict[str, str]
    help: str


_ROWS = "Decode rows (query token x layer), by how they were attended and why."
COUNTERS = (
    Counter("decode_rows_sparse", "decode_rows", {"mode": "sparse", "reason": ""}, _ROWS),
    Counter("decode_rows_dense_context", "decode_rows", {"mode": "dense", "reason": "context"}, _ROWS),
    Counter("decode_rows_dense_layer", "decode_rows", {"mode": "dense", "reason": "dense_layers"}, _ROWS),
    Counter("decode_rows_dense_budget", "decode_rows", {"mode": "dense", "reason": "no_budget"}, _ROWS),
    Counter("decode_rows_dense_window", "decode_rows", {"mode": "dense", "reason": "sliding_window"}, _ROWS),
    Counter("prefill_tokens_dense", "prefill_tokens", {}, "Prefill tokens (x layer), always dense."),
    Counter("pages_scored", "pages_scored", {}, "Pages whose bounds sparse rows read (x KV head x layer)."),
    Counter("pages_read", "pages_read", {}, "Pages whose K and V sparse rows read (x KV head x layer)."),
    Counter("bytes_read", "bytes_read", {}, "Bytes of K, V and bounds that sparse rows read."),
    Counter("bytes_dense", "bytes_dense", {}, "Bytes of K and V that the same rows would have read densely."),
)
_exported = False
_INDEX = {counter.key: index for index, counter in enumerate(COUNTERS)}


def _directory() -> Path:
    """The counters' directory, chosen once per vLLM instance: spawned processes inherit the choice."""
    if DIRECTORY_VARIABLE not in os.environ:
        path = Path(tempfile.gettempdir()) / f"vllm-quest-{os.getpid()}-{secrets.token_hex(4)}"
        os.environ[DIRECTORY_VARIABLE] = str(path)
        atexit.register(_remove, path, os.getpid())
    return Path(os.environ[DIRECTORY_VARIABLE])


def export() -> None:
    """Fixes the directory before vLLM spawns workers, and puts the counters next to vLLM's own metrics."""
    from prometheus_client import REGISTRY

    global _exported
    if not _exported:
        _directory()
        REGISTRY.register(QuestCollector())
        _exported = True


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child runs this hook too, and must leave its parent's files alone
        shutil.rmtree(path, ignore_errors=True)


class CounterFile:
    """The counters of one worker process, mapped to a file.

    Attributes:
        path: The file.
    """

    def __init__(self) -> None:
        directory = _directory()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = directory / f"{os.getpid()}.int64"
        exists = self.path.exists()  # two engines in one process share the file
        mapped = np.memmap(self.path, np.int64, "r+" if exists else "w+", shape=(len(COUNTERS),))
        self._values = np.asarray(mapped)  # the same memory, at half of what memmap's indexing costs

    def add(self, key: str, amount: int) -> None:
        """Adds `amount` to the counter `key`."""
        self._values[_INDEX[key]] += amount


def read_counters() -> dict[str, int]:
    """Sums the counters of all workers of the engines started by this process.

    Returns:
        One entry per name in `COUNTERS`; they only grow. All zero before the first step, or where no QUEST
        engine runs. Workers on other machines are not included.
    """
    total = np.zeros(len(COUNTERS), dtype=np.int64)
    for path in _directory().glob("*.int64"):
        values = np.fromfile(path, dtype=np.int64)
        if values.size == total.size:  # else a worker is just creating it
            total += values
    return {counter.key: int(value) for counter, value in zip(COUNTERS, total, strict=True)}


class QuestCollector:
    """Exports the counters as ``vllm_quest:*_total``; nothing where no QUEST worker runs.

    vLLM's servers with ``--api-server-count`` above 1 collect from files of prometheus_client only and do not
    ask this collector; `read_counters` works there too.
    """

    def describe(self) -> list[CounterMetricFamily]:
        """Nothing is promised before a worker counts."""
        return []

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Yields one metric family per name, as prometheus_client expects of a collector."""
        from prometheus_client.core import CounterMetricFamily

        if not _directory().is_dir():
            return
        values = read_counters()
        families: dict[str, CounterMetricFamily] = {}
        for counter in COUNTERS:
            family = families.get(counter.metric)
            if family is None:
                name = f"vllm_quest:{counter.metric}"
                family = CounterMetricFamily(name, counter.help, labels=list(counter.labels))
                families[counter.metric] = family
            family.add_metric(list(counter.labels.values()), values[counter.key])
        yield from families.values()
