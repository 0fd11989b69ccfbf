"""The memory bandwidth that a measurement's limits are quoted against."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

BYTES = 1 << 30


def bandwidth() -> float:
    """GB/s of memory: on CPUs the faster of a read and a copy by all threads, on GPUs a copy."""
    if torch.cuda.is_available():
        from benchmarks.kernels.gpu import copy_bandwidth

        return copy_bandwidth()
    source = torch.ones(BYTES // 4)
    target = torch.empty_like(source)
    read = source.nbytes / _median_seconds(source.sum)
    copy = 2 * source.nbytes / _median_seconds(lambda: target.copy_(source))
    return max(read, copy) / 1e9


def _median_seconds(work: Callable[[], object], repeats: int = 7) -> float:
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return median(times)
