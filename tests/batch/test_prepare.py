"""What `prepare` makes of rows, one by one; without an engine."""

from __future__ import annotations

import pyarrow as pa
import pytest

from vllm_quest.batch import pipeline
from vllm_quest.batch.records import INFERENCE_ERROR


def prepared(line: str, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> dict:
    """With a tokenizer that raises `error`."""

    def tokenizer(text: str) -> dict:
        if error is not None:
            raise error
        return {"input_ids": [1, 2]}

    monkeypatch.setattr(pipeline, "_tokenizer", lambda model: tokenizer)
    row = {"place": "in.jsonl:1", "line": line.encode()}
    return pipeline.prepare(row, model="none", model_name="small", defaults={})


def test_a_row_becomes_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    row = prepared('{"custom_id": "mine", "prompt": "Hi"}', monkeypatch)
    assert (row["custom_id"], row["tokenized_prompt"], row[INFERENCE_ERROR]) == ("mine", [1, 2], "")


def test_text_that_is_no_valid_unicode_is_an_error_of_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    row = prepared(r'{"custom_id": "mine", "prompt": "Hi \ud83d"}', monkeypatch)
    assert row["custom_id"] == "mine"
    assert row[INFERENCE_ERROR] == r"prompt: \ud83d is half a surrogate pair; allowed: valid Unicode"
    pa.array([row[INFERENCE_ERROR]])  # as Ray does


@pytest.mark.parametrize("error", [RuntimeError(), KeyError("\ud83d"), MemoryError("too long")])
def test_no_error_of_a_row_ends_the_batch(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    row = prepared('{"custom_id": "mine", "prompt": "Hi"}', monkeypatch, error)
    assert row["custom_id"] == "mine"
    assert row[INFERENCE_ERROR].startswith(type(error).__name__)
    pa.array([row[INFERENCE_ERROR]])


def test_a_tokenizer_that_cannot_be_loaded_is_no_rows_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(model: str) -> None:
        raise OSError("no such model")

    monkeypatch.setattr(pipeline, "_tokenizer", missing)
    with pytest.raises(OSError, match="no such model"):
        pipeline.prepare({"line": b'{"prompt": "Hi"}'}, model="none", model_name="small", defaults={})
