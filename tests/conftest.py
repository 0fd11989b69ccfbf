"""Settings that must be there before torch and vLLM are imported."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import pytest

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Spinning OpenMP threads make a busy two-core machine twenty times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Tests read vLLM's log; commands that quiet it are imported by tests too.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")


@pytest.fixture(scope="module")
def compiling():
    """A process where Triton's kernels are not the interpreter's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with (
        mock.patch.dict(os.environ, environment, clear=True),
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        yield pool
