"""The command line, as far as it comes without a cluster."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.batch.test_records import block, engine_row, write
from vllm_quest import __version__, cli
from vllm_quest.batch import command


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "x"}\n\n{"prompt": "y"}\n')
    return path


def run(capsys, *arguments: object) -> tuple[int, str]:
    """The exit status of ``vllm-quest batch``, and what it printed as an error."""
    status = command.main([str(argument) for argument in arguments])
    return status, capsys.readouterr().err


def test_the_dispatcher(capsys, monkeypatch) -> None:
    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["vllm-quest", *arguments])
        status = cli.main()
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    assert call()[0] == 0
    assert "batch " in call("--help")[1]
    assert call("--version") == (0, f"vllm-quest {__version__}\n")
    status, text = call("bach")
    assert status == 2
    assert "'bach' is not a command" in text


def test_without_ray(capsys, monkeypatch, rows, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "ray.data", None)
    status, text = run(capsys, rows, tmp_path / "out", "--model", "m")
    assert status == 1
    assert "pip install 'vllm-quest[ray]'" in text


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--quest", '{"tokenbudget": 1}', "--quest: additional_config['quest']: unknown key 'tokenbudget'"),
        ("--sampling", '{"temperature": -1}', "--sampling: temperature must be non-negative"),
        ("--sampling", '{"temprature": 1}', "--sampling: temprature: not supported"),
    ],
)
def test_wrong_settings_are_refused_before_anything_starts(
    capsys, rows, tmp_path, option, value, words
) -> None:
    status, text = run(capsys, rows, tmp_path / "out", "--model", "m", option, value)
    assert status == 1
    assert words in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value"), [("--replicas", "0"), ("--quest", "{"), ("--quest", "[]"), ("--format", "csv")]
)
def test_wrong_options(capsys, rows, tmp_path, option, value) -> None:
    with pytest.raises(SystemExit):
        run(capsys, rows, tmp_path / "out", "--model", "m", option, value)
    assert f"argument {option}" in capsys.readouterr().err


def test_no_input(capsys, tmp_path) -> None:
    status, text = run(capsys, tmp_path / "none.jsonl", tmp_path / "out", "--model", "m")
    assert status == 1
    assert "none.jsonl: no such file" in text


def test_a_finished_batch_starts_nothing_and_its_output_takes_no_other(capsys, rows, tmp_path) -> None:
    output = tmp_path / "out"
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert run(capsys, empty, output, "--model", "m")[0] == 0  # nothing to do: writes run.json
    write(output, "a_0", block(engine_row(0), engine_row(1, __inference_error__="bad")), finished=True)
    run_file = output / "run.json"
    noted = {"input": str(rows), "input_rows": 2, "input_bytes": len(rows.read_text())}
    run_file.write_text(json.dumps(json.loads(run_file.read_text()) | noted))
    assert run(capsys, rows, output, "--model", "m", "--replicas", "3")[0] == 0
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["rows"], summary["errors"], summary["resumed_rows"]) == (2, 1, 2)
    status, text = run(capsys, rows, output, "--model", "other", "--sampling", '{"seed": 1}')
    assert status == 1
    assert "holds records of another batch, with other model, served_model_name, sampling" in text
