"""The Python trees of the supported vLLM wheels, downloaded once and kept as ``*.py`` only.

They are read, never imported: no CUDA library is needed, and nothing is installed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from tests.contract.tree import Tree
from tools.small_model import cache_root

SUPPORTED = ("0.32.0", "0.33.0")
# The tags that vLLM's x86-64 wheels have had; named, so that any machine gets the same files.
_PLATFORMS = ("manylinux1_x86_64", *(f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 28, 31, 34, 35)))


class WheelError(RuntimeError):
    """A wheel could not be had; says what to do."""


def python_tree(version: str) -> Path:
    """The folder that holds ``vllm/`` of that version; downloads and unpacks it unless that was done before.

    Safe against earlier calls that were interrupted, and against concurrent ones.

    Raises:
        WheelError: The download failed, or the wheel is not what it should be.
    """
    folder = cache_root() / "contract" / version
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{version}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel releases it, also when this process is killed
        if not folder.is_dir():
            scratch = folder.with_name(f"{version}.partial")
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            try:
                _build(version, scratch).rename(folder)
            finally:
                shutil.rmtree(scratch)
            _progress(version, f"ready in {folder}")
    return folder


def _build(version: str, scratch: Path) -> Path:
    tree = scratch / "tree"
    with zipfile.ZipFile(_download(version, scratch)) as archive:
        names = [name for name in archive.namelist() if name.startswith("vllm/") and name.endswith(".py")]
        archive.extractall(tree, names)
    _progress(version, f"keeping {len(names)} Python files")
    if (found := Tree(tree).version) != version:
        raise WheelError(f"the wheel of vllm=={version} says that it is {found}")
    return tree


def _download(version: str, scratch: Path) -> Path:
    _progress(version, "downloading the wheel (about 330 MB, once)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-cache-dir", "--dest", str(scratch)]
    command += ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", "3.12"]
    command += [word for platform in _PLATFORMS for word in ("--platform", platform)]
    command += [f"vllm=={version}"]
    environment = {**os.environ, "TMPDIR": str(scratch)}  # where pip downloads to; watched, and removed after
    start = time.monotonic()
    pip = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )
    while True:
        try:
            _, errors = pip.communicate(timeout=5)
            break
        except subprocess.TimeoutExpired:
            _progress(version, f"{_size(scratch) / 1e6:.0f} MB after {time.monotonic() - start:.0f} s")
    wheels = list(scratch.glob("vllm-*.whl"))
    if pip.returncode or len(wheels) != 1:
        raise WheelError(
            f"pip could not download the wheel of vllm=={version}, whose Python files the contract test "
            f"reads. Check the network and pip's index. pip said:\n{errors.strip()}"
        )
    return wheels[0]


def _size(folder: Path) -> int:
    size = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # pip moves them
            size += file.stat().st_size
    return size


def _progress(version: str, line: str) -> None:
    print(f"vllm {version}: {line}", file=sys.stderr, flush=True)
