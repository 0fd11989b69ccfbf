"""Batches on a real Ray cluster with a real model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tools.small_model import prepare_model

# Before Ray is imported: its processes then listen on loopback only, and report nothing.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# vLLM's CPU workers leave these behind, named by a port; an engine that gets that port again does not start.
SHARED_MEMORY, SEGMENTS = Path("/dev/shm"), "*-cpushm_*"
collect_ignore_glob = [] if find_spec("ray") else ["test_*.py"]


@pytest.fixture(scope="session")
def model() -> str:
    return str(prepare_model())


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster with 6 CPUs and 2 GPUs, which are logical: vLLM's Ray executor wants them."""
    import ray

    from vllm_quest.backend.cpu_platform import RAY_EXECUTOR_VARIABLE
    from vllm_quest.metrics import DIRECTORY_VARIABLE

    with pytest.MonkeyPatch.context() as patch:
        # What engines in this process have put there for themselves; Ray's processes would inherit it.
        patch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
        patch.delenv(DIRECTORY_VARIABLE, raising=False)
        patch.setenv(RAY_EXECUTOR_VARIABLE, "1")
        ray.init(address="local", num_cpus=6, num_gpus=2, include_dashboard=False, logging_level="ERROR")
    others = set(SHARED_MEMORY.glob(SEGMENTS))
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
    for segment in set(SHARED_MEMORY.glob(SEGMENTS)) - others:
        segment.unlink(missing_ok=True)
