"""Several tokens per request and step, and 16-bit models."""

from __future__ import annotations

import pytest
from vllm import SamplingParams

import vllm_quest
from tests.engine.running import LAYERS, QUARTER, generate, metric

pytestmark = pytest.mark.engine


def test_speculated_tokens_select_for_themselves(engine, prose) -> None:
    """Drafts are verified as rows of their own: the tokens are those of decoding one by one."""
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    prompts = [prose[5000:5900], prose[3000:3040] * 20]
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
    llm = engine(QUARTER, speculative_config=speculation)
    speculated = generate(llm, prompts, params)
    assert metric(llm, "vllm:spec_decode_num_accepted_tokens") > 10
    assert speculated == generate(engine(QUARTER), prompts, params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_models(engine, prose, dtype) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    prompts = [prose[:300], prose[400:440]]
    small = {"max_model_len": 512, "kv_cache_memory_bytes": 1 << 26}
    dense = generate(engine(dtype=dtype, **small), prompts, params)
    covers_all = generate(engine({"token_budget": 512}, dtype=dtype, **small), prompts, params)
    assert covers_all == dense
    before = vllm_quest.read_counters()["decode_rows_sparse"]
    sparse = engine({"token_budget": 128, "dense_layers": 0}, dtype=dtype, **small)
    assert len(generate(sparse, prompts, params)[0]) == 8
    assert vllm_quest.read_counters()["decode_rows_sparse"] - before == 7 * LAYERS
