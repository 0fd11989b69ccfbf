"""One line of input -> one request: what a row may say, and why it is refused.

Rows are those of OpenAI's batch files, as vLLM's ``run-batch`` reads them (``custom_id``, ``method``,
``url``, ``body``), or flat: the fields of ``body`` beside an optional ``custom_id``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NoReturn

URLS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}
ENVELOPE = ("custom_id", "method", "url", "body")
# What a row and --sampling may set of vLLM's SamplingParams.
SAMPLING = (
    *("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids"),
    *("ignore_eos", "presence_penalty", "frequency_penalty", "repetition_penalty", "logprobs", "bad_words"),
    *("logit_bias", "allowed_token_ids", "skip_special_tokens", "spaces_between_special_tokens"),
    "include_stop_str_in_output",
)
TEMPLATE = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs")
IGNORED = ("user", "metadata", "store", "service_tier", "stream_options", "parallel_tool_calls")
# Fields that would change the answer, with the values that change nothing.
ONLY: dict[str, tuple] = {"n": (1,), "best_of": (1,), "stream": (False,), "echo": (False,), "tools": ([],)}


class RowError(ValueError):
    """A row that cannot become a request.

    Attributes:
        custom_id: The row's, as far as it could be read.
    """

    def __init__(self, problem: str, custom_id: str | None = None) -> None:
        super().__init__(problem)
        self.custom_id = custom_id


def reason(error: Exception) -> str:
    """What a row's error record says of `error`: never empty, always valid Unicode."""
    words = str(error) if isinstance(error, RowError) else f"{type(error).__name__}: {error}"
    return words.encode(errors="backslashreplace").decode()


@dataclass(frozen=True)
class Request:
    """What a row asks for.

    Attributes:
        custom_id: The user's name for the row; None where it gave none.
        prompt: Text or token ids; None for a chat.
        messages: The chat; None for a completion.
        sampling: What the row sets, a subset of `SAMPLING` and ``structured_outputs``.
        template: Arguments for the chat template, a subset of `TEMPLATE`.
    """

    custom_id: str | None
    prompt: str | list[int] | None
    messages: list[dict[str, Any]] | None
    sampling: dict[str, Any]
    template: dict[str, Any] = field(default_factory=dict)


def parse_row(line: bytes, model_name: str) -> Request:
    """Reads one row.

    Args:
        line: JSON.
        model_name: What the field ``model`` may say.

    Raises:
        RowError: Says what is wrong and what is allowed.
    """
    row = _object("a row", line)
    row = {key: value for key, value in row.items() if value is not None}
    custom_id = row.get("custom_id")
    if custom_id is not None and not isinstance(custom_id, str):
        raise RowError("custom_id: a string")
    _check_unicode("custom_id", custom_id)
    try:
        return _request(custom_id, row, model_name)
    except RowError as error:
        raise RowError(str(error), custom_id) from None


def _request(custom_id: str | None, row: dict[str, Any], model_name: str) -> Request:
    body = _body(row)
    for name, value in body.items():
        _check_unicode("the name of a field", name)
        _check_unicode(name, value)
    if body.pop("model", model_name) != model_name:
        raise RowError(f"model: this batch serves {model_name!r} (--served-model-name)")
    for name, allowed in ONLY.items():
        if name in body and body.pop(name) not in allowed:
            raise RowError(f"{name}: only {json.dumps(allowed[0])} is supported")
    messages, prompt = body.pop("messages", None), body.pop("prompt", None)
    if (messages is None) == (prompt is None):
        raise RowError("a row has either messages or prompt")
    template = {name: body.pop(name) for name in TEMPLATE if name in body}
    if messages is None:
        return Request(custom_id, _prompt(prompt), None, sampling_fields(body))
    return Request(custom_id, None, _messages(messages), sampling_fields(_chat_names(body)), template)


def _body(row: dict[str, Any]) -> dict[str, Any]:
    """The request's own fields, nulls left out."""
    if "body" not in row:
        return {key: value for key, value in row.items() if key not in ENVELOPE}
    if row.get("method", "POST") != "POST":
        raise RowError("method: POST")
    if row.get("url") not in URLS:
        raise RowError(f"url: {' or '.join(URLS)}, not {row.get('url')!r}")
    body = _object("body", row["body"])
    if body.get(URLS[row["url"]]) is None:
        raise RowError(f"body has no {URLS[row['url']]}, which {row['url']} needs")
    return {key: value for key, value in body.items() if value is not None}


def _object(name: str, text: Any) -> dict[str, Any]:
    """`text` itself, or the object that it is the JSON of."""
    try:
        value = _loads(text) if isinstance(text, str | bytes) else text
    except (ValueError, RecursionError) as error:
        raise RowError(f"{name} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise RowError(f"{name} is an object, not {type(value).__name__}")
    return value


def _check_unicode(name: str, value: Any) -> None:
    """Refuses half a surrogate pair, which JSON can say and UTF-8 cannot, anywhere in `value`."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        surrogate = f"\\u{ord(error.object[error.start]):04x}"
        raise RowError(f"{name}: {surrogate} is half a surrogate pair; allowed: valid Unicode") from None


def _loads(text: str | bytes) -> Any:
    """Python's JSON without NaN and without integers that neither Arrow nor torch could hold."""

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not allowed")

    def integer(digits: str) -> int:
        if -(1 << 63) <= (value := int(digits)) < 1 << 63:
            return value
        raise ValueError(f"{digits} has more than 64 bits")

    return json.loads(text, parse_constant=constant, parse_int=integer)


def _prompt(prompt: Any) -> str | list[int]:
    is_ids = isinstance(prompt, list) and all(type(token) is int and token >= 0 for token in prompt)
    if not prompt or not (isinstance(prompt, str) or is_ids):
        raise RowError("prompt: a text or a list of token ids, not empty")
    return prompt


def _messages(messages: Any) -> list[dict[str, Any]]:
    if not messages or not isinstance(messages, list):
        raise RowError("messages: a list, not empty")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RowError("messages: each is an object with a role")
    return [message | {"content": _text(message.get("content"))} for message in messages]


def _text(content: Any) -> str:
    """The text of a message; parts of text are joined as vLLM joins them."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            return "\n".join(texts)
    if not isinstance(content, str):
        raise RowError("messages: content is a text or a list of parts of type text")
    return content


def _chat_names(body: dict[str, Any]) -> dict[str, Any]:
    """The chat API's names for what vLLM calls otherwise."""
    if "max_completion_tokens" in body:
        body["max_tokens"] = body.pop("max_completion_tokens")
    top = body.pop("top_logprobs", 0)
    if isinstance(body.get("logprobs"), bool):
        body["logprobs"] = top if body["logprobs"] else None
    return body


def sampling_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Checks the names of sampling parameters, and brings ``stop`` and ``response_format`` into vLLM's form.

    Raises:
        RowError: A name that is not supported.
    """
    fields = {name: value for name, value in fields.items() if name not in IGNORED}
    structured = _structured(fields.pop("response_format", {"type": "text"}))
    for name in fields:
        if name not in SAMPLING:
            raise RowError(f"{name}: not supported; sampling parameters are {', '.join(SAMPLING)}")
    if isinstance(fields.get("stop"), str):
        fields["stop"] = [fields["stop"]]
    return fields | ({"structured_outputs": structured} if structured else {})


def _structured(response_format: Any) -> dict[str, Any] | None:
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    schema = (response_format.get("json_schema") or {}).get("schema") if kind == "json_schema" else None
    if not isinstance(schema, dict):
        raise RowError("response_format: of type text, json_object, or json_schema with a schema")
    return {"json": json.dumps(schema)}


def sampling_params(fields: dict[str, Any]) -> dict[str, Any]:
    """The arguments of vLLM's SamplingParams: `fields` in vLLM's types, and ``max_tokens`` always.

    Args:
        fields: As `sampling_fields` returns them.

    Raises:
        RowError: vLLM refuses a value; says which.
    """
    from pydantic import ValidationError
    from vllm.exceptions import VLLMError

    try:
        params = _validator().validate_python(fields)
    except ValidationError as error:
        # A place begins with the form of SamplingParams that was tried.
        places = [(".".join(map(str, one["loc"][1:])), one["msg"]) for one in error.errors()]
        raise RowError("; ".join(f"{place}: {message}" for place, message in places if place)) from None
    except (ValueError, TypeError, VLLMError) as error:
        raise RowError(str(error)) from None
    typed = {name: getattr(params, name) for name in SAMPLING if name in fields}
    return {"max_tokens": params.max_tokens} | fields | typed


@cache
def _validator() -> Any:
    from pydantic import TypeAdapter
    from vllm import SamplingParams

    return TypeAdapter(SamplingParams)
