"""What a user sees at start-up: one line that proves activity, or one error that names the cause."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from vllm import LLM, SamplingParams

import vllm_quest

pytestmark = pytest.mark.engine

TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "torch_dtype": "float32",
}
GEMMA3 = TINY | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 32,
}
DEEPSEEK = TINY | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 2,
    "first_k_dense_replace": 3,
}
WHISPER = {
    "architectures": ["WhisperForConditionalGeneration"],
    "model_type": "whisper",
    "is_encoder_decoder": True,
    "vocab_size": 512,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "max_source_positions": 100,
    "max_target_positions": 64,
}
BERT = TINY | {"architectures": ["BertModel"], "model_type": "bert", "max_position_embeddings": 128}
GEMMA2 = TINY | {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "sliding_window": 64,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 32,
}


def start(folder: Path | str, config: dict | None = None, quest: dict | None = None, **arguments) -> LLM:
    if config is not None:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        arguments |= {"load_format": "dummy", "skip_tokenizer_init": True}
    settings = {
        "model": str(folder),
        "dtype": "float32",
        "enforce_eager": True,
        "kv_cache_memory_bytes": 1 << 26,
        "distributed_executor_backend": "uni",
        "attention_backend": "QUEST",
        "additional_config": {"quest": quest or {}},
    }
    return LLM(**(settings | arguments))


@pytest.fixture
def plugin_log(monkeypatch) -> list[str]:
    """What the plugin logs. Caught at its logger: vLLM resets handlers whenever it configures logging."""
    messages: list[str] = []
    logger = logging.getLogger("vllm.plugins.quest")
    monkeypatch.setattr(logger, "handle", lambda record: messages.append(record.getMessage()))
    return messages


def test_sliding_window_layers_run_dense_and_say_so(tmp_path, plugin_log) -> None:
    quest = {"token_budget": 64, "page_size": 8, "bounds_dtype": "auto", "sink_pages": 1, "recent_pages": 1}
    llm = start(tmp_path, GEMMA3, quest)
    lines = [message for message in plugin_log if message.startswith("QUEST:")]
    assert len(lines) == len(llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups)
    text = "\n".join(lines)
    assert "layers 1 sparse" in text
    assert "layers 0 dense (sliding window)" in text
    assert "layers 2 dense (sliding window)" in text
    assert "64 tokens = 8 pages of 8" in text
    assert "bounds of 8 tokens 256 B (float32)" in text  # kmin and kmax, 32 channels of 4 bytes
    assert "metadata 11.1 %" in text
    before = vllm_quest.read_counters()
    params = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True, detokenize=False)
    llm.generate([{"prompt_token_ids": list(range(1, 201))}], params, use_tqdm=False)
    after = vllm_quest.read_counters()
    assert after["decode_rows_sparse"] - before["decode_rows_sparse"] == 4
    assert after["decode_rows_dense_window"] - before["decode_rows_dense_window"] == 8


@pytest.mark.parametrize(
    ("quest", "arguments", "words"),
    [
        ({"page_size": 24}, {}, ["additional_config['quest'].page_size", "24", "8, 16, 32, 64"]),
        ({"tokenbudget": 512}, {}, ["unknown key 'tokenbudget'", "did you mean 'token_budget'"]),
        ({"token_budget": 1024}, {"kv_cache_dtype": "fp8"}, ["--kv-cache-dtype", "fp8", "allowed: auto"]),
        ({"page_size": 64}, {"block_size": 96}, ["--block-size 96", "page_size 64"]),
        ({"scorer": "oracle"}, {}, ["scorer", "'oracle'", "minmax"]),
    ],
)
def test_a_wrong_configuration_is_one_error_before_the_model_loads(model, quest, arguments, words) -> None:
    with pytest.raises(ValueError, match=r"(?i)quest") as error:
        start(model, quest=quest, **arguments)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        pytest.param(DEEPSEEK, ["MLA"], id="MLA"),
        pytest.param(WHISPER, ["cross-attention"], id="cross-attention"),
        pytest.param(BERT, ["encoder"], id="encoder"),
        pytest.param(GEMMA2, ["logits soft cap"], id="soft cap"),
    ],
)
def test_models_that_do_not_fit_are_refused_with_the_reason(tmp_path, config, words) -> None:
    with pytest.raises(ValueError, match="QUEST cannot run") as error:
        start(tmp_path, config)
    for word in words:
        assert word in str(error.value)


def test_a_configuration_without_the_backend_is_noticed(model, plugin_log) -> None:
    start(model, quest={"token_budget": 512}, attention_backend="CPU_ATTN", max_model_len=512)
    assert "additional_config['quest'] has no effect" in "\n".join(plugin_log)


def test_an_engine_starts_where_numba_is_loaded(model) -> None:
    """vLLM's scan for Triton kernels trips over llvmlite; the platform hides it."""
    import numba  # noqa: F401

    engines = [start(model, attention_backend=name, max_model_len=256) for name in ("CPU_ATTN", "QUEST")]
    for llm in engines:
        assert llm.generate("Hello", SamplingParams(max_tokens=2), use_tqdm=False)[0].outputs[0].text


DENSE_RUN = """
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
llm = LLM(model=sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=1024,
          kv_cache_memory_bytes=1 << 27, distributed_executor_backend="uni")
prompts = [{"prompt_token_ids": list(range(100, 100 + n))} for n in (5, 300, 700)]
params = SamplingParams(max_tokens=12, temperature=0, logprobs=5, ignore_eos=True)
outputs = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
layers = runner.compilation_config.static_forward_context.values()
print(json.dumps({
    "tokens": [list(output.token_ids) for output in outputs],
    "logprobs": [[{t: p.logprob.hex() for t, p in step.items()} for step in o.logprobs] for o in outputs],
    "impls": sorted({f"{type(layer.impl).__module__}.{type(layer.impl).__name__}" for layer in layers}),
    "cache": [list(cache.shape) for cache in runner.kv_caches],
    "builders": sorted({type(g.get_metadata_builder()).__name__ for gs in runner.attn_groups for g in gs}),
    "loaded": sorted(name for name in sys.modules if name.startswith("vllm_quest")),
}))
"""


def test_installed_but_not_selected_changes_nothing(model) -> None:
    """Same classes, same cache, bit-identical outputs, with the plugin and without; so the same speed."""
    runs = []
    for plugins in ({}, {"VLLM_PLUGINS": ""}):
        done = subprocess.run(
            [sys.executable, "-c", DENSE_RUN, model],
            env={**dict(os.environ), **plugins},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    installed, absent = runs
    assert installed.pop("loaded"), "the plugin was there"
    assert absent.pop("loaded") == []
    assert installed == absent
    assert installed["impls"] == ["vllm.v1.attention.backends.cpu_attn.CPUAttentionBackendImpl"]
