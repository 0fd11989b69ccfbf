"""The CPU backend where numba has more threads than OpenMP, as with `OMP_NUM_THREADS` below the cores."""

from __future__ import annotations

import os
import subprocess
import sys

DENSE = """
from tests.backend.harness import Engine
from vllm_quest.backend.cpu import QuestCPUBackend

engine = Engine(QuestCPUBackend, {"token_budget": None})
engine.step([(0, 100, True)], seed=0)
"""


def test_the_first_step_of_a_dense_configuration_keeps_openmps_threads() -> None:
    """vLLM's kernel ends the process if their number changes between its schedule and its attention."""
    threads = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", DENSE], env=os.environ | threads, check=True)
