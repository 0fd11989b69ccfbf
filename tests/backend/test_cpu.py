"""The CPU backend in a process with fewer threads than cores, as `OMP_NUM_THREADS` asks for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

DENSE = """
from tests.backend.harness import Engine
from vllm_quest.backend.cpu import QuestCPUBackend

engine = Engine(QuestCPUBackend, {"token_budget": None})
engine.step([(0, 100, True)], seed=0)
"""


@pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="needs two cores: numba would start as many threads"
)
def test_the_first_step_of_a_dense_configuration_keeps_openmps_threads() -> None:
    """vLLM's kernel ends the process if their number changes between its schedule and its attention."""
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_NUM_THREADS"}
    subprocess.run([sys.executable, "-c", DENSE], env=environment | {"OMP_NUM_THREADS": "1"}, check=True)
