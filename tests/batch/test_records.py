"""Records, the files that hold them, and what is counted of them; without a cluster."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.data.block import BlockAccessor

from vllm_quest.batch.records import SCHEMA, RecordSink, jsonl, record
from vllm_quest.batch.summary import Summary, Totals, checkpoint_path, read_totals, remove_unfinished


def engine_row(number: int, **more: object) -> dict:
    """A row as ``ray.data.llm`` returns it."""
    row = {
        "row": number,
        "place": f"in.jsonl:{number + 1}",
        "custom_id": "mine",
        "is_chat": True,
        "max_tokens": 3,
        "num_input_tokens": 5,
        "num_generated_tokens": 2,
        "generated_tokens": [7, 8],
        "generated_text": 'say "ä"\n',
        "logprobs": None,
        "__inference_error__": "",
    }
    return row | more


def block(*rows: dict) -> pa.Table:
    return pa.Table.from_pylist([record(row, "small") for row in rows], schema=SCHEMA)


def test_records_have_openais_form() -> None:
    text = jsonl(block(engine_row(0), engine_row(1, __inference_error__="bad")))
    good, bad = (json.loads(line) for line in text.splitlines())
    assert list(good) == list(bad) == ["id", "custom_id", "response", "error"]
    assert (good["id"], good["custom_id"], good["error"]) == ("in.jsonl:1", "mine", None)
    body = good["response"]["body"]
    assert body["choices"][0]["message"] == {"role": "assistant", "content": 'say "ä"\n'}
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    assert bad["response"] is None
    assert bad["error"]["message"] == "in.jsonl:2: bad"


def test_completions_and_lengths() -> None:
    (line,) = jsonl(block(engine_row(0, is_chat=False, max_tokens=2))).splitlines()
    (choice,) = json.loads(line)["response"]["body"]["choices"]
    assert choice == {"index": 0, "finish_reason": "length", "text": 'say "ä"\n', "logprobs": None}


@pytest.mark.parametrize(
    "broken",
    [
        {"generated_text": None, "generated_tokens": None},
        {"logprobs": [{}], "generated_tokens": [7]},
        {"num_input_tokens": None},
    ],
)
def test_an_answer_that_cannot_be_written_is_an_error_of_its_row(broken: dict) -> None:
    bad, good = map(json.loads, jsonl(block(engine_row(0, **broken), engine_row(1))).splitlines())
    assert bad["response"] is None
    assert bad["custom_id"] == "mine"
    assert bad["error"]["message"].removeprefix("in.jsonl:1: ")
    assert good["error"] is None


def logprob(value: float, rank: int, token: str) -> dict:
    return {"logprob": value, "rank": rank, "decoded_token": token}


def test_logprobs_name_the_chosen_token_and_the_best() -> None:
    steps = [{7: logprob(-2.0, 2, "b"), 5: logprob(-1.0, 1, "a")}, {8: logprob(-0.5, 1, "ä")}]
    (line,) = jsonl(block(engine_row(0, logprobs=steps))).splitlines()
    first, second = json.loads(line)["response"]["body"]["choices"][0]["logprobs"]["content"]
    assert (first["token"], first["logprob"]) == ("b", -2.0)
    assert [entry["token"] for entry in first["top_logprobs"]] == ["a", "b"]
    assert bytes(second["bytes"]).decode() == "ä"


def test_logprobs_of_the_completions_api() -> None:
    steps = [{7: logprob(-2.0, 1, "ab")}, {8: logprob(-1.0, 1, "c")}]
    (line,) = jsonl(block(engine_row(0, is_chat=False, logprobs=steps))).splitlines()
    assert json.loads(line)["response"]["body"]["choices"][0]["logprobs"] == {
        "tokens": ["ab", "c"],
        "token_logprobs": [-2.0, -1.0],
        "top_logprobs": [{"ab": -2.0}, {"c": -1.0}],
        "text_offset": [0, 2],
    }


def write(output: Path, name: str, table: pa.Table, finished: bool, file_format: str = "jsonl") -> tuple:
    """One output file and Ray's note of it."""
    reported: list[tuple] = []
    sink = RecordSink(str(output), file_format, lambda *counts: reported.append(counts))
    content = io.BytesIO()
    sink.write_block_to_file(BlockAccessor.for_block(table), content)
    output.mkdir(exist_ok=True)
    (output / f"{name}.{file_format}").write_bytes(content.getvalue())
    notes = Path(checkpoint_path(str(output)))
    notes.mkdir(exist_ok=True)
    pq.write_table(table.select(["row"]), notes / f"{name}{'' if finished else '.pending'}.parquet")
    return reported[0]


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_only_finished_files_count(tmp_path, file_format) -> None:
    output = tmp_path / "out"
    assert read_totals(str(output)) == Totals()
    one = block(engine_row(0), engine_row(1, __inference_error__="bad"))
    assert write(output, "a_0", one, finished=True, file_format=file_format) == (2, 1, 5, 2)
    write(output, "a_1", block(engine_row(2)), finished=False, file_format=file_format)
    (output / "a_2.jsonl").write_bytes(b'{"id": "in.js')  # half written, not noted at all
    (output / "run.json").write_text("{}")
    assert read_totals(str(output)) == Totals(2, 1, 5, 2)


def test_files_that_nobody_noted_are_removed_but_only_rays(tmp_path) -> None:
    output = tmp_path / "out"
    late, noted = f"{0:032x}_000003", f"{1:032x}_000000"
    write(output, noted, block(engine_row(0)), finished=True)
    write(output, late, block(engine_row(0)), finished=False)
    (output / "mine.jsonl").touch()
    remove_unfinished(str(output))
    assert {path.name for path in output.iterdir()} == {f"{noted}.jsonl", "mine.jsonl"}


def test_a_row_with_two_records_is_an_error(tmp_path) -> None:
    output = tmp_path / "out"
    write(output, "a_0", block(engine_row(0), engine_row(1)), finished=True)
    write(output, "b_0", block(engine_row(1)), finished=True)
    with pytest.raises(RuntimeError, match="1 rows have more than one record"):
        read_totals(str(output))


def test_the_summary_adds_up_nodes_and_counts_this_runs_tokens_only() -> None:
    node = {"decode_rows_sparse": 30, "decode_rows_dense_context": 10, "bytes_read": 1, "bytes_dense": 4}
    summary = Summary.of("out", Totals(10, 1, 100, 90), Totals(4, 0, 40, 30), 2.0, 3, {"a": node, "b": node})
    assert summary.tokens_per_s_per_replica == 10.0
    assert summary.resumed_rows == 4
    assert summary.sparse_share == 0.75
    assert summary.read_share == 0.25
    assert "10, 1 with an error, 4 of them finished by an earlier run" in summary.text()
    assert json.loads(json.dumps(summary.as_json()))["nodes"]["a"] == node


def test_the_summary_of_a_run_that_had_nothing_to_do() -> None:
    summary = Summary.of("out", Totals(4, 0, 40, 30), Totals(4, 0, 40, 30), 0.1, 1, {})
    assert summary.sparse_share is None
    assert summary.tokens_per_s_per_replica == 0
    assert "sparse  none" in summary.text()
