"""Settings that must be there before torch and vLLM are imported, and what pytest says of the whole run.

Only this file's hooks are called in the process that prints: the others are loaded where tests are collected.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from unittest import mock

import pytest

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Spinning OpenMP threads make a busy two-core machine twenty times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Tests read vLLM's log; commands that quiet it are imported by tests too.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")

CONTRACT_RESULT = "contract with vLLM"  # a test's property: a line of the summary
# What `make test-fast` leaves out, by parts of a test's id: Triton's interpreter and compiler, what numba
# compiles for many shapes, clusters, copies of vLLM's tree. Engines have a mark of their own.
SLOW = (
    "triton",
    "test_ptx",
    "kernels/test_joining",
    "kernels/test_store",
    "kernels/test_attend",
    "kernels/test_step",
    "kernels/test_int4",
    "kernels/test_dequantize",
    "backend/test_gpu",
    "backend/test_cpu.py",
    "batch/test_batch",
    "batch/test_cluster",
    "benchmarks/test_kernels",
    "contract/test_check",
    "contract/test_ours",
    "tools/test_compiled",
    "test_registration.py::test_a_fresh_process",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(part in item.nodeid for part in SLOW):
            item.add_marker("slow")


def pytest_report_header() -> str:
    return "" if find_spec("ray") else "tests/batch is left out: Ray is not installed (make install-ray)"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for group in terminalreporter.stats.values() for report in group]
    properties = [entry for report in reports for entry in getattr(report, "user_properties", ())]
    results = dict.fromkeys(text for name, text in properties if name == CONTRACT_RESULT)
    if results:
        terminalreporter.section(CONTRACT_RESULT)
        for line in results:
            terminalreporter.line(line)


@pytest.fixture(scope="module")
def compiling():
    """A process where Triton's kernels are not the interpreter's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with (
        mock.patch.dict(os.environ, environment, clear=True),
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        yield pool
