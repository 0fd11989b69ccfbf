"""The model that the demo and the tests use."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import small_model as model


def test_a_broken_model_folder_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_QUEST_CACHE", str(tmp_path))
    folder = tmp_path / model.MODEL_NAME
    for leftover in (folder, folder.with_name(f"{folder.name}.partial")):
        leftover.mkdir()
        (leftover / "config.json").write_text("stale")
    built = []

    def convert(gguf: Path, target: Path) -> None:
        built.append(target)
        for name in model.NEEDED_FILES:
            (target / name).write_text("fresh")

    monkeypatch.setattr(model, "_download", lambda scratch: scratch / "model.gguf")
    monkeypatch.setattr(model, "_convert", convert)
    assert model.prepare_model() == model.prepare_model() == folder
    assert len(built) == 1
    assert (folder / "config.json").read_text() == "fresh"
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name, f"{folder.name}.lock"]
