"""What a measurement ran on, and the bandwidth that its limits are quoted against."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

BANDWIDTH_BYTES = 1 << 30


def machine() -> dict[str, str]:
    """Versions and device."""
    import torch
    import vllm
    from vllm.platforms import current_platform

    import vllm_quest

    device = _cpu_name() if current_platform.is_cpu() else current_platform.get_device_name()
    return {
        "vllm-quest": vllm_quest.__version__,
        "vLLM": vllm.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "device": device,
        "cores": str(len(os.sched_getaffinity(0))),
    }


def command() -> dict[str, str]:
    """How this measurement was started, and when."""
    spec = sys.modules["__main__"].__spec__
    module = spec.name.removesuffix(".__main__") if spec else sys.argv[0]
    return {
        "command": " ".join(["python -m", module, *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def bandwidth() -> float:
    """GB/s of memory: on CPUs the faster of a read and a copy by all threads, on GPUs a copy."""
    import torch

    if torch.cuda.is_available():
        from benchmarks.kernels.gpu import copy_bandwidth

        return copy_bandwidth()
    source = torch.ones(BANDWIDTH_BYTES // 4)
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


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
