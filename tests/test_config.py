"""Every wrong entry is one clear error that names the field and what is allowed."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest

from vllm_quest.config import QuestConfig, QuestConfigError


def test_defaults_are_valid_and_frozen() -> None:
    config = QuestConfig.from_dict({})
    assert config == QuestConfig()
    assert (config.token_budget, config.page_size, config.dense_layers) == (2048, 8, 0)
    assert (config.bounds_dtype, config.sink_pages, config.group_reduce) == ("int8", 1, "max")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.page_size = 16  # type: ignore[misc]


def test_every_field_can_be_set() -> None:
    entries = {
        "token_budget": 512,
        "page_size": 32,
        "dense_layers": 3,
        "sink_pages": 2,
        "recent_pages": 1,
        "group_reduce": "mean",
        "scorer": "minmax",
        "min_context": 4096,
        "kv_dtype": "int4",
        "bounds_dtype": "bfloat16",
        "value_group_size": 64,
        "value_threshold": 6.5,
        "decode_tail": 0,
    }
    assert dataclasses.asdict(QuestConfig.from_dict(entries)) == entries
    assert QuestConfig.from_dict({"decode_tail": 32}).decode_tail == 32
    assert set(entries) == {field.name for field in dataclasses.fields(QuestConfig)}
    assert QuestConfig.from_dict(entries).budget_pages == 16
    assert QuestConfig.from_dict(entries).sparse_context == 4096
    assert QuestConfig.from_dict(entries | {"min_context": 512}).sparse_context == 513


def test_4_bit_pages_have_16_tokens_unless_told_otherwise() -> None:
    assert QuestConfig.from_dict({}).page_size == 8
    assert QuestConfig.from_dict({"kv_dtype": "int4"}).page_size == 16
    assert QuestConfig.from_dict({"kv_dtype": "int4", "page_size": 32}).page_size == 32


def test_vllms_cache_dtype_says_int4_as_kv_dtype_does() -> None:
    """Fields that stand with int4 only are then allowed, too."""
    entries = {"bounds_dtype": "bfloat16", "value_group_size": 64}
    vllm_config = SimpleNamespace(
        additional_config={"quest": entries},
        cache_config=SimpleNamespace(cache_dtype="quest_int4", user_specified_block_size=False),
        model_config=None,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        scheduler_config=None,
    )
    assert QuestConfig.from_vllm_config(vllm_config) == QuestConfig.from_dict(entries | {"kv_dtype": "int4"})


def test_no_budget_means_everything() -> None:
    assert QuestConfig.from_dict({"token_budget": None}).token_budget is None
    assert QuestConfig.from_dict({"token_budget": None}).sparse_context > 2**30


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"page_size": 24}, ["page_size", "24", "8, 16, 32, 64"]),
        ({"page_size": "16"}, ["page_size", "'16'", "8, 16, 32, 64"]),
        ({"page_size": True}, ["page_size", "True"]),
        ({"token_budget": 0}, ["token_budget", "0", "at least 1"]),
        ({"token_budget": 1024.0}, ["token_budget", "1024.0", "an integer"]),
        ({"kv_dtype": "fp8"}, ["kv_dtype", "'fp8'", "auto, int4"]),
        ({"bounds_dtype": "int4"}, ["bounds_dtype", "'int4'", "auto, int8, bfloat16"]),
        ({"bounds_dtype": "bfloat16"}, ["bounds_dtype", "'bfloat16'", "auto, int8 unless kv_dtype=int4"]),
        ({"value_group_size": 48, "kv_dtype": "int4"}, ["value_group_size", "48", "None, 32, 64, 128"]),
        ({"value_group_size": 64}, ["value_group_size", "64", "kv_dtype=int4"]),
        ({"token_budget": 1001}, ["token_budget", "1001", "multiple of 8"]),
        ({"token_budget": 1000, "page_size": 16}, ["token_budget", "1000", "multiple of 16"]),
        ({"token_budget": 16}, ["token_budget", "16", "at least 24", "sink_pages=1", "recent_pages=2"]),
        ({"token_budget": 32, "sink_pages": 4}, ["token_budget", "at least 48"]),
        ({"dense_layers": -1}, ["dense_layers", "-1", "at least 0"]),
        ({"dense_layers": False}, ["dense_layers", "False"]),
        ({"sink_pages": -2}, ["sink_pages", "-2"]),
        ({"recent_pages": 0}, ["recent_pages", "0", "at least 1"]),
        ({"min_context": "4k"}, ["min_context", "'4k'"]),
        ({"value_threshold": 0}, ["value_threshold", "0", "a positive number, or null"]),
        ({"value_threshold": math.inf}, ["value_threshold", "inf", "a positive number"]),
        ({"value_threshold": math.nan}, ["value_threshold", "nan", "a positive number"]),
        ({"value_threshold": True}, ["value_threshold", "True", "a positive number"]),
        ({"value_threshold": "6"}, ["value_threshold", "'6'", "a positive number"]),
        ({"decode_tail": -1}, ["decode_tail", "-1", "at least 0"]),
        ({"decode_tail": 4, "group_reduce": "softmax_mean"}, ["decode_tail", "group_reduce=softmax_mean"]),
        ({"group_reduce": "sum"}, ["group_reduce", "'sum'", "max, mean, softmax_mean"]),
        ({"scorer": "mean"}, ["scorer", "'mean'", "minmax"]),
        ({"token_bugdet": 512}, ["unknown key 'token_bugdet'", "did you mean 'token_budget'", "page_size"]),
        ({7: 1}, ["unknown key 7"]),
        ([("page_size", 8)], ["not a mapping"]),
        ("fast", ["'fast'", "not a mapping"]),
    ],
)
def test_wrong_entries_name_the_field_and_what_is_allowed(entries, words) -> None:
    with pytest.raises(QuestConfigError) as error:
        QuestConfig.from_dict(entries)
    assert str(error.value).startswith("additional_config['quest']")
    for word in words:
        assert word in str(error.value)
