"""Counters: written by workers, added up by readers, exported to Prometheus."""

from __future__ import annotations

import multiprocessing
import os

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from vllm_quest import metrics


@pytest.fixture
def directory(tmp_path, monkeypatch):
    path = tmp_path / "counters"
    monkeypatch.setenv(metrics.DIRECTORY_VARIABLE, str(path))
    return path


def _work(amount: int) -> None:
    file = metrics.CounterFile()
    file.add("pages_read", amount)
    file.add("pages_read", 1)
    file.add("decode_rows_sparse", 2)


def test_workers_add_up(directory) -> None:
    assert set(metrics.read_counters().values()) == {0}
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_work, args=(amount,)) for amount in (10, 200)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    counters = metrics.read_counters()
    assert counters["pages_read"] == 212
    assert counters["decode_rows_sparse"] == 4
    assert counters["pages_scored"] == 0


def test_two_engines_in_one_process_share_a_file(directory) -> None:
    _work(1)
    _work(1)
    assert metrics.read_counters()["pages_read"] == 4
    assert [path.name for path in directory.iterdir()] == [f"{os.getpid()}.int64"]


def test_a_file_that_is_being_created_is_left_out(directory) -> None:
    _work(1)
    (directory / "99.int64").write_bytes(b"\0\0\0")
    assert metrics.read_counters()["pages_read"] == 2


def test_an_unknown_counter_is_an_error(directory) -> None:
    with pytest.raises(KeyError, match="pages_raed"):
        metrics.CounterFile().add("pages_raed", 1)


def test_prometheus_text(directory) -> None:
    registry = CollectorRegistry()
    registry.register(metrics.QuestCollector())
    assert generate_latest(registry) == b"", "nothing where no worker runs QUEST"
    _work(5)
    text = generate_latest(registry).decode()
    assert "vllm_quest:pages_read_total 6.0" in text
    assert 'vllm_quest:decode_rows_total{mode="sparse",reason=""} 2.0' in text
    assert 'vllm_quest:decode_rows_total{mode="dense",reason="sliding_window"} 0.0' in text
