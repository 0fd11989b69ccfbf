"""Every row has exactly one record, whatever is killed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.batch import rows_200
from tests.batch.running import (
    assert_gone,
    command,
    engines,
    finish,
    processes,
    records,
    start,
    wait_for,
)

pytestmark = pytest.mark.engine

# They take a minute to notice that their node is gone.
RAY_AGENTS = ("ray::RuntimeEnvAgent", "ray::DashboardAgent")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_bytes(rows_200.text())
    return tmp_path


def check_records(output: Path) -> dict[str, dict]:
    """The output is what the input asks for; returns the records by id."""
    found = records(output)
    by_id = {record["id"]: record for record in found}
    assert len(found) == len(by_id) == rows_200.ROWS
    bad = rows_200.bad_lines()
    for number in range(1, rows_200.ROWS + 1):
        record = by_id[f"rows.jsonl:{number}"]
        if number in bad:
            assert record["response"] is None
            assert f"rows.jsonl:{number}: " in record["error"]["message"]
            assert bad[number][1] in record["error"]["message"]
        else:
            assert record["error"] is None
            assert record["custom_id"] == json.loads(rows_200.good_line(number))["custom_id"]
            body = record["response"]["body"]
            assert 0 < body["usage"]["completion_tokens"] <= rows_200.TOKENS
            if number % 3 == 0:
                assert len(body["choices"][0]["logprobs"]["tokens"]) == body["usage"]["completion_tokens"]
    summary = json.loads((output / "summary.json").read_text())
    answered = [record["response"]["body"] for record in found if record["response"]]
    assert (summary["rows"], summary["errors"]) == (rows_200.ROWS, len(bad))
    assert summary["completion_tokens"] == sum(body["usage"]["completion_tokens"] for body in answered)
    return by_id


def finished(output: Path) -> set[str]:
    """Names of the output files that Ray has noted as finished."""
    notes = output.with_name(f"{output.name}.checkpoint")
    return {path.stem for path in notes.glob("*.parquet") if "pending" not in path.name}


def contents(output: Path) -> dict[str, bytes]:
    """The output files by name."""
    return {path.stem: path.read_bytes() for path in output.glob("*.jsonl")}


def test_every_row_has_one_record_whatever_is_killed(folder, model) -> None:
    """Two engines. The driver is killed; the same command goes on; then one of its engines is killed."""
    output, log = folder / "out", folder / "log"
    arguments = command(folder / "rows.jsonl", output, model, "--replicas", "2")

    driver = start(arguments, log)
    wait_for(lambda: len(finished(output)) > 2, driver, log)
    everything = processes(driver)
    driver.kill()
    driver.wait()
    assert_gone(everything, but=RAY_AGENTS)
    before = {name: text for name, text in contents(output).items() if name in finished(output)}
    done = sum(text.count(b"\n") for text in before.values())
    assert 0 < done < rows_200.ROWS / 2

    driver = start(arguments, log)
    wait_for(lambda: len(finished(output)) > len(before) + 2 and len(engines(driver)) == 2, driver, log)
    seen = engines(driver)
    everything += processes(driver)
    os.kill(min(seen), signal.SIGKILL)
    assert len(records(output)) < rows_200.ROWS
    wait_for(lambda: engines(driver) - seen, driver, log)  # the replacement
    everything += processes(driver)
    finish(driver, log)
    check_records(output)
    after = contents(output)
    assert {name: after[name] for name in before} == before  # not done again

    summary = json.loads((output / "summary.json").read_text())
    assert summary["resumed_rows"] == done
    (counters,) = summary["nodes"].values()
    assert counters["decode_rows_sparse"] > 0
    assert 0 < summary["sparse_share"] <= 1

    finish(start(arguments, log), log, seconds=60)  # nothing is left to do: no engine starts
    assert contents(output) == after
    assert_gone(everything)
