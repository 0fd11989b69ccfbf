"""Wheels are kept as Python files only, and a failed download is an error."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tests.contract.wheels import WheelError, python_tree


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only source; the cache is empty."""
    monkeypatch.setenv("VLLM_QUEST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path


def _wheel(folder: Path, version: str, says: str) -> None:
    with zipfile.ZipFile(folder / f"vllm-{version}-cp38-abi3-manylinux_2_28_x86_64.whl", "w") as archive:
        archive.writestr("vllm/_version.py", f"__version__ = version = '{says}'\n")
        archive.writestr("vllm/v1/backend.py", "class Backend: ...\n")
        archive.writestr("vllm/_C.abi3.so", b"machine code")
        archive.writestr("vllm_extra/other.py", "")
        info = f"vllm-{version}.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: cp38-abi3-any\n")
        archive.writestr(f"{info}/RECORD", "")


def _left(index: Path) -> list[str]:
    """What the cache holds afterwards, but for empty locks."""
    cache = index / "cache" / "contract"
    return sorted(str(f.relative_to(cache)) for f in cache.rglob("*") if f.is_file() and f.suffix != ".lock")


def test_only_python_files_are_kept_and_kept_once(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _wheel(index, "9.9.1", "9.9.1")
    folder = python_tree("9.9.1")
    assert _left(index) == ["9.9.1/vllm/_version.py", "9.9.1/vllm/v1/backend.py"]
    assert "vllm 9.9.1: keeping 2 Python files\n" in capsys.readouterr().err
    (index / "vllm-9.9.1-cp38-abi3-manylinux_2_28_x86_64.whl").unlink()
    assert python_tree("9.9.1") == folder
    assert capsys.readouterr().err == ""


def test_a_failed_download_is_an_error_and_leaves_nothing(index: Path) -> None:
    with pytest.raises(WheelError, match=r"could not download the wheel of vllm==9\.9\.2(.|\n)*No matching"):
        python_tree("9.9.2")
    assert _left(index) == []


def test_what_an_interrupted_run_left_is_removed(index: Path) -> None:
    left = index / "cache" / "contract" / "9.9.1.partial" / "tree"
    left.mkdir(parents=True)
    (left / "half.py").write_text("")
    _wheel(index, "9.9.1", "9.9.1")
    python_tree("9.9.1")
    assert not left.parent.exists()


def test_a_wheel_of_another_version_is_refused(index: Path) -> None:
    _wheel(index, "9.9.3", "1.2.3")
    with pytest.raises(WheelError, match=r"says that it is 1\.2\.3"):
        python_tree("9.9.3")
    assert _left(index) == []
