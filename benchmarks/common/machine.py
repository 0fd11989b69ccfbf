"""What a measurement ran on, and how it was started."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path


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


def program() -> str:
    """How the running command is called, without its arguments: ``python -m benchmarks.kernels.gpu``."""
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else f"python {sys.argv[0]}"


def command() -> dict[str, str]:
    """How this measurement was started, and when (UTC)."""
    return {
        "command": " ".join([program(), *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
