"""Each version of vLLM has everything that vllm_quest relies on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import CONTRACT_RESULT
from tests.contract.check import breaches, size
from tests.contract.contract import CONTRACT
from tests.contract.coverage import missing
from tests.contract.ours import Package
from tests.contract.tree import Tree

ROOT = Path(__file__).parents[2]


def test_vllm_has_everything_that_we_rely_on(
    tree: Tree, record_property: Callable[[str, object], None]
) -> None:
    broken = breaches(tree, CONTRACT)
    record_property(CONTRACT_RESULT, f"{tree.label}: {size(CONTRACT)} reliances, {len(broken)} broken")
    if broken:
        pytest.fail(f"{len(broken)} broken:\n\n" + "\n\n".join(map(str, broken)), pytrace=False)


def test_vllm_can_call_our_methods_as_its_own(tree: Tree) -> None:
    broken = [override for override in Package(ROOT, tree).overrides() if override.misfit()]
    if broken:
        pytest.fail(f"{tree.label} calls them otherwise:\n\n" + "\n\n".join(map(str, broken)), pytrace=False)


def test_every_use_of_vllm_has_an_entry(tree: Tree) -> None:
    """Per version: a name of ours that a new version takes for itself is a new reliance too."""
    unlisted = missing(Package(ROOT, tree).uses(), CONTRACT, tree)
    if unlisted:
        lines = "\n".join(map(str, unlisted))
        pytest.fail(
            f"{tree.label}; add entries under these files to tests/contract:\n\n{lines}", pytrace=False
        )
