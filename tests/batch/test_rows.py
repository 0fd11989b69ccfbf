"""What a row may say, without Ray."""

from __future__ import annotations

import json

import pytest

from vllm_quest.batch.rows import RowError, parse_row, reason, sampling_fields, sampling_params

CHAT = [{"role": "user", "content": "Hello"}]


def parse(row: object):
    return parse_row(json.dumps(row).encode(), "small")


def test_a_row_of_run_batch() -> None:
    """The example of vLLM's documentation, with another model."""
    row = {
        "custom_id": "request-1",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "small", "messages": CHAT, "max_completion_tokens": 1000, "temperature": None},
    }
    request = parse(row)
    assert (request.custom_id, request.messages, request.prompt) == ("request-1", CHAT, None)
    assert request.sampling == {"max_tokens": 1000}


def test_flat_rows() -> None:
    chat = parse({"custom_id": "a", "messages": CHAT, "temperature": 0, "stop": "end", "user": "somebody"})
    assert chat.messages == CHAT
    assert chat.sampling == {"temperature": 0, "stop": ["end"]}
    assert parse({"prompt": "Hello"}).custom_id is None
    assert parse({"prompt": [1, 2, 3], "seed": 7}).prompt == [1, 2, 3]


def test_a_body_may_be_json_in_a_string() -> None:
    """As Parquet files have it, whose columns need one type."""
    row = {"method": "POST", "url": "/v1/completions", "body": json.dumps({"prompt": "x", "max_tokens": 3})}
    assert parse(row).sampling == {"max_tokens": 3}


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert parse({"messages": [{"role": "user", "content": parts}]}).messages[0]["content"] == "one\ntwo"


def test_the_chat_template_gets_its_arguments() -> None:
    arguments = {"add_generation_prompt": False, "chat_template_kwargs": {"thinking": True}}
    assert parse({"messages": CHAT} | arguments).template == arguments


@pytest.mark.parametrize(
    ("fields", "logprobs"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 3}, 3),
    ],
)
def test_logprobs_of_the_chat_api(fields: dict, logprobs: int | None) -> None:
    assert parse({"messages": CHAT} | fields).sampling.get("logprobs") == logprobs


def test_response_format() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    structured = parse({"messages": CHAT, "response_format": wanted}).sampling["structured_outputs"]
    assert json.loads(structured["json"]) == schema
    assert "structured_outputs" not in parse({"messages": CHAT, "response_format": {"type": "text"}}).sampling


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"prompt": "\xff"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"prompt": "x", "temperature": NaN}', "NaN is not allowed"),
        (b'{"prompt": "x", "seed": 9223372036854775808}', "64 bits"),
        (b"7", "an object, not int"),
        (b"{}", "either messages or prompt"),
        (b'{"prompt": "x", "messages": []}', "either messages or prompt"),
        (b'{"prompt": ""}', "not empty"),
        (b'{"prompt": ["one", "two"]}', "list of token ids"),
        (b'{"prompt": [true]}', "list of token ids"),
        (b'{"messages": []}', "not empty"),
        (b'{"messages": ["Hello"]}', "an object with a role"),
        (b'{"messages": [{"role": "user"}]}', "content is a text"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "of type text"),
        (b'{"custom_id": 3, "prompt": "x"}', "custom_id: a string"),
        (b'{"prompt": "x", "model": "large"}', "'small'"),
        (b'{"prompt": "x", "n": 4}', "n: only 1"),
        (b'{"prompt": "x", "stream": true}', "stream: only false"),
        (b'{"messages": [{"role": "user", "content": "x"}], "tools": [{}]}', "tools: only []"),
        (b'{"prompt": "x", "tempreature": 0}', "tempreature: not supported"),
        (b'{"prompt": "x", "response_format": {"type": "xml"}}', "response_format"),
        (b'{"method": "GET", "url": "/v1/completions", "body": {"prompt": "x"}}', "method: POST"),
        (b'{"method": "POST", "url": "/v1/score", "body": {"prompt": "x"}}', "/v1/chat/completions"),
        (b'{"url": "/v1/completions", "body": {"messages": []}}', "body has no prompt"),
        (b'{"url": "/v1/completions", "body": "{"}', "body is not JSON"),
        (b'{"url": "/v1/completions", "body": [1]}', "body is an object"),
    ],
)
def test_bad_rows(line: bytes, words: str) -> None:
    with pytest.raises(RowError) as error:
        parse_row(line, "small")
    assert words in str(error.value)


def test_a_bad_row_keeps_its_name() -> None:
    with pytest.raises(RowError) as error:
        parse({"custom_id": "mine", "prompt": 3})
    assert error.value.custom_id == "mine"


def test_sampling_parameters_in_vllms_types() -> None:
    fields = sampling_fields({"temperature": 0, "stop": "x", "logit_bias": {"7": -100}})
    params = sampling_params(fields)
    assert params == {"temperature": 0.0, "stop": ["x"], "logit_bias": {7: -100.0}, "max_tokens": 16}
    assert sampling_params({"max_tokens": None}) == {"max_tokens": None}
    structured = {"structured_outputs": {"json": "{}"}}
    assert sampling_params(structured) == structured | {"max_tokens": 16}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": -1}, "temperature must be non-negative"),
        ({"temperature": "hot"}, "temperature: "),
        ({"top_k": 1.5}, "top_k: "),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"stop_token_ids": 4}, "stop_token_ids: "),
        ({"allowed_token_ids": ["a"]}, "allowed_token_ids.0: "),
        ({"seed": "x", "top_p": "y"}, "seed: "),
    ],
)
def test_bad_sampling_parameters(fields: dict, words: str) -> None:
    with pytest.raises(RowError) as error:
        sampling_params(fields)
    assert words in str(error.value)
    assert "SamplingParams" not in str(error.value)


HALF = "\ud83d"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": f"Hi {HALF}"},
        {"prompt": "\ude00 Hi"},
        {"messages": [{"role": "user", "content": HALF}]},
        {"messages": [{"role": "user", "content": "Hi", "name": HALF}]},
        {"prompt": "Hi", "stop": [HALF]},
        {"prompt": "Hi", HALF: 1},
        {"prompt": "Hi", "metadata": {HALF: 1}},
        {"url": "/v1/completions", "body": {"prompt": HALF}},
        {"url": "/v1/completions", "body": json.dumps({"prompt": HALF})},
    ],
    ids=ascii,
)
def test_half_a_surrogate_pair_is_refused_wherever_it_is(row: dict) -> None:
    with pytest.raises(RowError, match=r"\\ud83d|\\ude00") as refused:
        parse({"custom_id": "mine"} | row)
    assert refused.value.custom_id == "mine"
    str(refused.value).encode()


def test_a_custom_id_is_valid_unicode() -> None:
    with pytest.raises(RowError, match=r"custom_id: .*half a surrogate pair") as refused:
        parse({"custom_id": HALF, "prompt": "Hi"})
    assert refused.value.custom_id is None


def test_a_whole_surrogate_pair_is_a_character() -> None:
    assert parse({"prompt": "\U0001f600"}).prompt == "\U0001f600"


@pytest.mark.parametrize("error", [RuntimeError(), RuntimeError("\ud83d"), RowError("stop: a text")])
def test_a_reason_is_never_empty_and_can_be_written(error: Exception) -> None:
    assert reason(error).encode()
