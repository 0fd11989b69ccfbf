"""Answers -> the records of OpenAI's batch output, one per row, and the files that hold them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ray.data.block import BlockAccessor
from ray.data.datasource import BlockBasedFileDatasink

from vllm_quest.batch.rows import reason

# `response` and `error` are JSON, or null. `row` is what Ray's checkpoint goes by.
SCHEMA = pa.schema(
    [
        *(("row", pa.int64()), ("id", pa.string()), ("custom_id", pa.string())),
        *(("response", pa.string()), ("error", pa.string())),
        *(("prompt_tokens", pa.int64()), ("completion_tokens", pa.int64())),
    ]
)
INFERENCE_ERROR = "__inference_error__"  # the column by which ray.data.llm passes rows by that have failed


def record(row: dict[str, Any], model_name: str) -> dict[str, Any]:
    """The record, a row of `SCHEMA`, of one row of the pipeline.

    Args:
        row: What came out of the processor of ``ray.data.llm``.
        model_name: What ``model`` says in the response.
    """
    head = {"row": row["row"], "id": row["place"], "custom_id": row["custom_id"]}
    problem = row[INFERENCE_ERROR]
    if not problem:
        try:
            return head | _answer(row, model_name)
        except Exception as failure:  # whatever it is, it is one row's, and must not end the batch
            problem = reason(failure)
    error = {"code": "invalid_request_error", "message": f"{row['place']}: {problem}"}
    return head | {
        "response": None,
        "error": json.dumps(error),
        "prompt_tokens": 0,
        "completion_tokens": 0,
    }


def _answer(row: dict[str, Any], model_name: str) -> dict[str, Any]:
    tokens = {
        "prompt_tokens": int(row["num_input_tokens"]),
        "completion_tokens": int(row["num_generated_tokens"]),
    }
    body = {
        "id": f"{'chatcmpl' if row['is_chat'] else 'cmpl'}-{row['place']}",
        "object": "chat.completion" if row["is_chat"] else "text_completion",
        "created": int(time.time()),
        "model": model_name,
        "choices": [_choice(row)],
        "usage": tokens | {"total_tokens": sum(tokens.values())},
    }
    response = {"status_code": 200, "request_id": row["place"], "body": body}
    return {"response": json.dumps(response), "error": None} | tokens


def _choice(row: dict[str, Any]) -> dict[str, Any]:
    text, steps = row["generated_text"], row["logprobs"]
    ids = [int(token) for token in row["generated_tokens"]]
    # ray.data.llm does not hand on why vLLM stopped.
    is_full = 0 < row["max_tokens"] <= len(ids)
    choice: dict[str, Any] = {"index": 0, "finish_reason": "length" if is_full else "stop"}
    if row["is_chat"]:
        choice["message"] = {"role": "assistant", "content": text}
        choice["logprobs"] = None if steps is None else {"content": _logprobs(steps, ids)}
    else:
        choice["text"] = text
        choice["logprobs"] = None if steps is None else _completion_logprobs(_logprobs(steps, ids))
    return choice


def _logprobs(steps: list[dict[Any, dict]], ids: list[int]) -> list[dict[str, Any]]:
    """One entry per token, as the chat API has them."""

    def entry(logprob: dict[str, Any]) -> dict[str, Any]:
        token = logprob["decoded_token"] or ""
        return {"token": token, "logprob": logprob["logprob"], "bytes": list(token.encode())}

    entries = []
    for step, token_id in zip(steps, ids, strict=True):
        by_id = {int(key): value for key, value in step.items() if value is not None}
        top = sorted(by_id.values(), key=lambda logprob: logprob["rank"])
        entries.append(entry(by_id[token_id]) | {"top_logprobs": [entry(logprob) for logprob in top]})
    return entries


def _completion_logprobs(entries: list[dict[str, Any]]) -> dict[str, list]:
    """The same as the completions API has it."""
    tokens = [entry["token"] for entry in entries]
    return {
        "tokens": tokens,
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [
            {top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries
        ],
        "text_offset": list(accumulate(map(len, tokens), initial=0))[:-1],
    }


def jsonl(block: pa.Table) -> bytes:
    """The records of a block of `SCHEMA`, a line each."""

    def line(one: dict[str, Any]) -> str:
        response, error = one["response"] or "null", one["error"] or "null"  # JSON already
        head = json.dumps({"id": one["id"], "custom_id": one["custom_id"]}).removesuffix("}")
        return f'{head}, "response": {response}, "error": {error}}}\n'

    return "".join(line(one) for one in block.to_pylist()).encode()


class RecordSink(BlockBasedFileDatasink):
    """Writes each block of records to a file of its own.

    Args:
        path: The output folder.
        file_format: ``jsonl`` or ``parquet``.
        on_block: Called with the number of rows, errors, prompt tokens and completion tokens of each block.
    """

    def __init__(self, path: str, file_format: str, on_block: Callable[[int, int, int, int], None]) -> None:
        super().__init__(path, file_format=file_format)
        self._on_block = on_block

    def write_block_to_file(self, block: BlockAccessor, file: pa.NativeFile) -> None:
        """Writes one file; Ray calls this once per block."""
        table = block.to_arrow().select(SCHEMA.names).cast(SCHEMA)
        if self.file_format == "parquet":
            pq.write_table(table, file)
        else:
            file.write(jsonl(table))
        tokens = [sum(table[name].to_pylist()) for name in ("prompt_tokens", "completion_tokens")]
        self._on_block(table.num_rows, table.num_rows - table["error"].null_count, *tokens)
