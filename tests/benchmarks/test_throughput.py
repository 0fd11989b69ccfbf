"""What is compared, and how it is shown; the engines themselves are not started."""

from __future__ import annotations

import json

import pytest

from benchmarks.common.pairs import Ratio
from benchmarks.engine.contenders import dense, quest
from benchmarks.engine.dummy_model import SIZES, write_config
from benchmarks.engine.throughput_report import report
from benchmarks.kernels.roofline import Geometry, Step, quest_bytes
from vllm_quest.config import QuestConfig, QuestConfigError


def test_dense_contenders_by_vllms_names() -> None:
    assert dense("FLASH_ATTN").engine_args == {"attention_backend": "FLASH_ATTN"}
    with_dtype = dense("TRITON_ATTN:int4_per_token_head")
    assert with_dtype.backend == "TRITON_ATTN"
    assert with_dtype.engine_args["kv_cache_dtype"] == "int4_per_token_head"


def test_a_quest_contender_is_named_by_what_is_not_default() -> None:
    contender = quest({"page_size": 16, "dense_layers": 0}, 1024)
    assert contender.name == "QUEST 1024 page_size=16"
    assert contender.engine_args["attention_backend"] == "QUEST"
    assert contender.engine_args["additional_config"]["quest"]["token_budget"] == 1024


def test_wrong_entries_are_refused_before_an_engine_starts() -> None:
    with pytest.raises(QuestConfigError, match="page_size"):
        quest({"page_size": 7}, 1024)


def test_fewer_layers_keep_the_share_of_the_vocabulary(tmp_path) -> None:
    write_config(tmp_path, "llama-3.1-8b", layers=4, max_model_len=4096)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_hidden_layers"] == 4
    assert config["vocab_size"] / 128256 == pytest.approx(4 / 32, rel=0.01)
    assert config["num_attention_heads"] * config["head_dim"] == config["hidden_size"]


@pytest.mark.parametrize("layers", [0, 33])
def test_layers_out_of_range(tmp_path, layers) -> None:
    with pytest.raises(ValueError, match="--layers"):
        write_config(tmp_path, "llama-3.1-8b", layers=layers, max_model_len=4096)


@pytest.mark.parametrize("name", SIZES)
def test_every_geometry_is_one_that_transformers_reads(tmp_path, name) -> None:
    from transformers import AutoConfig

    write_config(tmp_path, name, layers=None, max_model_len=2048)
    assert AutoConfig.from_pretrained(tmp_path).num_hidden_layers == SIZES[name].num_layers


@pytest.mark.parametrize(
    ("entries", "kv", "bounds"),
    [
        ({"bounds_dtype": "auto"}, 2 * 2048 * 128 * 2, 2 * 2048 * 128 * 2),
        ({"bounds_dtype": "int8"}, 2 * 2048 * 128 * 2, 2048 * (2 * 128 + 8)),
        ({"kv_dtype": "int4"}, 2048 * (128 + 4), 2048 * (2 * 128 + 8)),
        ({"kv_dtype": "int4", "bounds_dtype": "bfloat16"}, 2048 * (128 + 4), 2 * 2048 * 128 * 2),
        ({"kv_dtype": "int4", "value_group_size": 32}, 2048 * (128 + 16), 2048 * (2 * 128 + 8)),
    ],
)
def test_limits_count_what_pages_hold(entries, kv, bounds) -> None:
    """32k tokens, one KV head of 128 channels: 2,048 pages' bounds, 2,048 tokens of K and V."""
    config = QuestConfig.from_dict({"page_size": 16} | entries)
    step = Step(Geometry(4, 1, 128), 1, 32768, **quest_bytes(config, 128))
    assert step.quest()["kv"] == kv
    assert step.quest()["bounds"] == bounds


def side(name: str, tokens_per_s: float, **more: float) -> dict:
    samples = {"prefill_s": [1.0, 2.0], "tokens_per_s": [tokens_per_s], "attention_ms": []}
    return {
        **{"name": name, "prefill_tokens_per_s": 100.0, "tokens_per_s": tokens_per_s},
        **{"tpot_p50_ms": 11.0, "tpot_p99_ms": 12.0, "limit_tokens_per_s": 50.0, "share_of_limit": 0.25},
        **{"kv_tokens": 40_000, "requests_at_once": 9, "kv_bytes_per_token": 46080.0},
        **{"peak_memory_bytes": 2**30, "samples": samples},
        **more,
    }


def measured_rows() -> list[dict]:
    ratio = vars(Ratio(1.5, 1.4, 1.6, 5))
    key = {"contender": "QUEST 1024", "batch": 4}
    return [
        {
            **key,
            "kind": "cell",
            "context": 4096,
            "baseline": side("CPU_ATTN", 10.0),
            "measured": side("QUEST 1024", 15.0, attention_ms=3.0, attention_share_of_limit=0.8),
            "ratios": {"decode": ratio, "prefill": ratio, "attention": ratio},
        },
        {
            **key,
            "kind": "break-even",
            "context": 0,
            "found": 1280,
            "resolution": 128,
            "probes": {"2048": 1.1},
        },
        {"contender": "FLASH_ATTN", "kind": "skipped", "context": 0, "batch": 0, "reason": "no GPU"},
    ]


def test_the_picture_is_drawn(tmp_path) -> None:
    plots = pytest.importorskip("benchmarks.engine.plots", reason="needs the extra 'plot'")
    plots.plot_throughput(measured_rows(), tmp_path / "throughput.png")
    assert (tmp_path / "throughput.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_says_everything_measured_and_what_was_not() -> None:
    text = report(measured_rows())
    assert "1.50x (1.40-1.60)" in text
    assert "25 %" in text
    assert "80 %" in text
    assert "40,000" in text
    assert "1,280 tokens (to 128)" in text
    assert "FLASH_ATTN: not measured: no GPU" in text
    dense_line = next(line for line in text.splitlines() if line.startswith("CPU_ATTN"))
    assert "not measured" in dense_line
    assert "1.50x" not in dense_line
