"""The contract covers what vllm_quest uses, and nothing that it names is gone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.contract.conftest import installed
from tests.contract.contract import CONTRACT
from tests.contract.coverage import missing
from tests.contract.ours import Package
from tests.contract.planned import PLANNED
from tests.contract.test_vllm import ROOT
from tests.contract.wheels import SUPPORTED


def edited(folder: Path, file: str, old: str, new: str) -> Package:
    """vllm_quest with `old` replaced in `file`."""
    shutil.copytree(ROOT / "vllm_quest", folder / "vllm_quest", ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / file
    assert old in path.read_text(), f"{file} has no {old!r} to change"
    path.write_text(path.read_text().replace(old, new))
    return Package(folder, installed())


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        pytest.param(
            "vllm_quest/backend/step.py",
            "import torch\n",
            "import torch\nfrom vllm.config import LoadConfig\n",
            "step.py:14 uses vllm.config.load.LoadConfig",
            id="import",
        ),
        pytest.param(
            "vllm_quest/config.py",
            "model.use_mla",
            "model.is_hybrid",
            "uses vllm.config.model.ModelConfig.is_hybrid",
            id="attribute of a variable",
        ),
        pytest.param(
            "vllm_quest/backend/cpu.py",
            "self.head_dim",
            "self.window_size",
            "uses vllm.v1.attention.backends.cpu_attn.CPUAttentionMetadataBuilder.window_size",
            id="attribute of self",
        ),
        pytest.param(
            "vllm_quest/backend/backend.py",
            "    supports_sink = _no",
            "    supports_sliding_window = _no",
            "replaces vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend.supports_sliding_window",
            id="override in a class that is mixed in",
        ),
        pytest.param(
            "vllm_quest/compat.py",
            "registry.register_backend(name, path)",
            "registry.register_backend(name, path, is_mamba=False)",
            "with 2 positional arguments and ['is_mamba']",
            id="another way to call",
        ),
    ],
)
def test_a_new_use_needs_an_entry(tmp_path: Path, file: str, old: str, new: str, expected: str) -> None:
    unlisted = missing(edited(tmp_path, file, old, new).uses(), CONTRACT, installed())
    assert any(expected in str(use) for use in unlisted), unlisted


def test_a_method_that_vllm_cannot_call_is_found(tmp_path: Path) -> None:
    package = edited(
        tmp_path,
        "vllm_quest/backend/cpu_platform.py",
        "num_heads: int | None = None",
        "num_heads: int | None",
    )
    (broken,) = (override for override in package.overrides() if override.misfit())
    assert "ours requires what is optional in vLLM" in str(broken)
    assert "num_heads=None) [vllm/platforms/cpu.py:" in str(broken)


def test_entries_stand_under_files_that_exist() -> None:
    assert [file for file in CONTRACT if file not in PLANNED and not (ROOT / file).is_file()] == []


def test_the_entry_points_are_in_the_groups_that_vllm_loads() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    groups = {entry.value for entry in CONTRACT["pyproject.toml"] if entry.value}
    assert {
        line.split('"')[1] for line in text.splitlines() if line.startswith('[project.entry-points."')
    } == groups


def test_the_versions_that_users_may_install_are_checked() -> None:
    from packaging.specifiers import SpecifierSet

    text = (ROOT / "pyproject.toml").read_text()
    (allowed,) = (line.split('"')[1] for line in text.splitlines() if line.startswith('gpu = ["vllm>='))
    range_ = SpecifierSet(allowed.removeprefix("vllm"))
    lowest, highest = SUPPORTED[0], SUPPORTED[-1]
    major, minor, _ = map(int, highest.split("."))
    assert all(version in range_ for version in SUPPORTED)
    assert f"{major}.{minor + 1}.0" not in range_
    assert f"{major}.{int(lowest.split('.')[1]) - 1}.99" not in range_
