"""The versions of vLLM that are checked: the installed one, and with ``-m contract`` the supported wheels."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import CONTRACT_RESULT
from tests.contract.tree import Tree
from tests.contract.wheels import SUPPORTED, WheelError, python_tree

MARKER = "contract"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the downloads to those who ask for them: ``-m contract``."""
    if MARKER not in config.option.markexpr:
        wheels = [item for item in items if item.get_closest_marker(MARKER)]
        config.hook.pytest_deselected(items=wheels)
        items[:] = [item for item in items if item not in wheels]


@cache
def installed() -> Tree:
    """The vLLM that is installed here, for CPU or GPU."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.fail("vLLM is not installed", pytrace=False)
    tree = Tree(Path(spec.submodule_search_locations[0]).parent)
    tree.label = f"vLLM {tree.version} (installed)"
    return tree


@cache
def of_wheel(version: str) -> Tree | WheelError:
    """A supported version, from its wheel; or why it could not be had, found out once."""
    try:
        return Tree(python_tree(version), f"vLLM {version} (wheel)")
    except WheelError as error:
        return error


@pytest.fixture(params=["installed", *(pytest.param(v, marks=pytest.mark.contract) for v in SUPPORTED)])
def tree(
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> Tree:
    """One version of vLLM after the other."""
    if request.param == "installed":
        return installed()
    with capsys.disabled():  # a download shows its progress
        tree = of_wheel(request.param)
    if isinstance(tree, WheelError):
        record_property(CONTRACT_RESULT, f"vLLM {request.param} (wheel): NOT CHECKED, no wheel")
        pytest.fail(str(tree), pytrace=False)
    return tree
