"""4-bit pages in a running engine: vLLM's own figures of capacity, prefix hits, preemption, a pass key."""

from __future__ import annotations

import pytest
from vllm import SamplingParams

from tests.engine.running import GREEDY, KV_HEADS, LAYERS, generate, generate_all, metric
from vllm_quest import read_counters

pytestmark = pytest.mark.engine

DENSE = {"kv_dtype": "int4", "token_budget": None}
SPARSE = {"kv_dtype": "int4", "token_budget": 512}


def test_more_tokens_fit(engine) -> None:
    dense, int4 = engine(), engine(DENSE)
    tokens = [llm.llm_engine.vllm_config.cache_config.num_gpu_blocks * 128 for llm in (dense, int4)]
    layout_bytes = 2 * 64 * 4  # of float32 K and V, per token and head
    content = (1 << 28) / (tokens[1] * LAYERS * KV_HEADS)
    assert tokens[1] / tokens[0] == pytest.approx(layout_bytes / content, rel=0.03)
    assert tokens[1] > 5.5 * tokens[0]


def test_the_first_token_is_the_dense_one(engine, prose) -> None:
    """A prompt in one chunk is computed without looking at the pages, to the last bit."""
    one = SamplingParams(temperature=0, max_tokens=1, logprobs=1)
    prompts = [{"prompt_token_ids": prose[at : at + length]} for at, length in ((0, 300), (900, 1200))]

    def logprobs(llm) -> list[float]:
        outputs = llm.generate(prompts, one, use_tqdm=False)
        return [next(iter(output.outputs[0].logprobs[0].values())).logprob for output in outputs]

    whole = {"max_num_batched_tokens": 4096, "enable_prefix_caching": False}
    assert logprobs(engine(DENSE, **whole)) == logprobs(engine(**whole))


def test_prefix_hits_and_preemption_change_nothing(engine, prose) -> None:
    """The same engine, with room and without: what was computed once stays as it was."""
    prompts = [prose[:300] + prose[i * 700 : i * 700 + 210 * (1 + i % 3)] for i in range(8)]
    params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    chunks = {"max_num_batched_tokens": 256, "max_model_len": 1536, "enable_prefix_caching": False}
    roomy = engine(SPARSE, **chunks)
    tight = engine(SPARSE, **chunks | {"num_gpu_blocks_override": 17})
    alone = [generate_all(roomy, [prompt], params)[0] for prompt in prompts]
    together = generate_all(tight, prompts, params)
    assert metric(tight, "vllm:num_preemptions") > 0
    # Rows of a batch do not see each other; a preempted request prefills what it had decoded.
    same = sum(a == b for a, b in zip(alone, together, strict=True))
    assert same >= len(prompts) - metric(tight, "vllm:num_preemptions")


def test_a_pass_key_survives(engine, prose, model) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    key = tokenizer.encode(" The pass key is 48213. Remember it: the pass key is 48213.\n\n")
    question = tokenizer.encode("\n\nThe pass key is")
    prompt = prose[:1200] + key + prose[1200:3000] + question
    answer = generate(engine(), [prompt], SamplingParams(temperature=0, max_tokens=6))[0]
    assert "48213" in tokenizer.decode(answer)
    before = read_counters()
    for quest in (DENSE, SPARSE | {"token_budget": 1024}):
        got = generate(engine(quest), [prompt], SamplingParams(temperature=0, max_tokens=6))[0]
        assert "48213" in tokenizer.decode(got)
    grown = {name: value - before[name] for name, value in read_counters().items()}
    assert grown["decode_rows_sparse"] == 5 * (LAYERS - 2)
    assert grown["decode_rows_dense_budget"] == 5 * LAYERS
    # A 4-bit page of 16 tokens is read in less than a quarter of its float32 bytes, bounds included.
    assert grown["bytes_read"] < grown["bytes_dense"] / 4


def test_decoding_is_the_same_in_any_company(engine, prose) -> None:
    prompts = [prose[:900], prose[2000:2033], prose[4000:5100]]
    llm = engine(SPARSE)
    assert generate(llm, prompts, GREEDY) == [generate(llm, [prompt], GREEDY)[0] for prompt in prompts]
