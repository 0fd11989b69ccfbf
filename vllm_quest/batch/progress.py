"""The progress bar: the tasks that write files report to an actor, which the driver asks."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from tqdm import tqdm

from vllm_quest.batch.summary import Totals

SECONDS = 0.5 if sys.stderr.isatty() else 10  # a line each where it is no terminal


class Tally:
    """Counts what is written. A block that is written again counts again: this is for the eye only."""

    def __init__(self) -> None:
        self._totals = Totals()

    def add(self, *block: int) -> None:
        """Adds one block, as `RecordSink` reports it."""
        self._totals = self._totals.plus(block)

    def read(self) -> Totals:
        """What was written so far."""
        return self._totals

    @classmethod
    def start(cls) -> ray.actor.ActorHandle:
        """The actor."""
        actor_class: Any = ray.remote(num_cpus=0)(cls)
        return actor_class.remote()


@contextmanager
def progress_bar(tally: ray.actor.ActorHandle, rows: int, before: Totals) -> Iterator[None]:
    """Shows rows, errors, tokens/s and the time left while the body runs.

    Args:
        tally: The actor.
        rows: Of the input.
        before: What an earlier run had finished.
    """
    done = threading.Event()
    start = time.monotonic()

    def show(bar: tqdm) -> None:
        answer: Any = tally.read.remote()
        try:
            totals: Totals = ray.get(answer)
        except ray.exceptions.RayActorError:  # the actor's node is gone; the batch does not need it
            return
        bar.n = min(rows, before.rows + totals.rows)
        speed = totals.completion_tokens / (time.monotonic() - start)
        bar.set_postfix_str(f"{before.errors + totals.errors} errors, {speed:.0f} tokens/s")

    def follow(bar: tqdm) -> None:
        while not done.wait(SECONDS):
            show(bar)

    with tqdm(total=rows, initial=before.rows, unit="row", dynamic_ncols=True) as bar:
        thread = threading.Thread(target=follow, args=(bar,), daemon=True)
        thread.start()
        try:
            yield
            show(bar)
        finally:
            done.set()
            thread.join(10)
