"""A budget that covers the context gives the dense backend's tokens, whatever vLLM does around it."""

from __future__ import annotations

import random

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.engine.running import generate_all, metric

pytestmark = pytest.mark.engine

COVERS_ALL = {"token_budget": 4096}


def test_twenty_prompts_with_chunks_prefix_hits_and_preemption(engine, prose) -> None:
    rng = random.Random(0)
    shared = prose[:300]
    prompts = [shared + prose[i * 700 : i * 700 + rng.choice([1, 17, 63, 210, 577])] for i in range(10)]
    prompts += [prose[i * 500 : i * 500 + rng.choice([3, 40, 129, 800])] for i in range(10)]
    rng.shuffle(prompts)
    params = SamplingParams(max_tokens=90, temperature=0, ignore_eos=True)
    # 17 blocks of 128 tokens for eight requests at a time: too few, so that some are preempted.
    tight = {"num_gpu_blocks_override": 17, "max_num_batched_tokens": 256, "max_model_len": 1536}
    dense, quest = engine(**tight), engine(COVERS_ALL, **tight)
    assert generate_all(quest, prompts, params) == generate_all(dense, prompts, params)
    for llm in (dense, quest):
        assert metric(llm, "vllm:num_preemptions") > 0
        assert metric(llm, "vllm:prefix_cache_hits") > 0


@pytest.mark.parametrize(
    "params",
    [
        pytest.param(SamplingParams(n=4, temperature=1.0, seed=7, max_tokens=24), id="n=4"),
        pytest.param(SamplingParams(temperature=0, max_tokens=24, min_tokens=24), id="greedy"),
        pytest.param(
            SamplingParams(
                temperature=0,
                max_tokens=40,
                structured_outputs=StructuredOutputsParams(
                    json={"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}}}
                ),
            ),
            id="structured output",
        ),
    ],
)
def test_sampling_features(engine, prose, params) -> None:
    prompts = [prose[:5], prose[100:1100], prose[3000:3063], prose[4000:4500]]
    expected = generate_all(engine(), prompts, params)
    assert generate_all(engine(COVERS_ALL), prompts, params) == expected
    assert all(len(samples) == params.n and all(samples) for samples in expected)


def test_page_size_and_block_size_are_independent(engine, prose) -> None:
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    prompts = [prose[:200], prose[500:1500]]
    expected = generate_all(engine(), prompts, params)
    for page_size, block_size in [(8, 32), (16, 32), (64, 64), (32, 96)]:
        llm = engine(COVERS_ALL | {"page_size": page_size}, block_size=block_size)
        assert generate_all(llm, prompts, params) == expected


def test_abort_leaves_the_others_alone(engine, prose) -> None:
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    prompts = {"a": prose[:400], "b": prose[600:1500], "c": prose[2000:2030]}

    def run(llm) -> dict[str, tuple[int, ...]]:
        core = llm.llm_engine
        for name, ids in prompts.items():
            core.add_request(name, {"prompt_token_ids": ids}, params)
        tokens, steps = {}, 0
        while core.has_unfinished_requests():
            for output in core.step():
                tokens[output.request_id] = tuple(output.outputs[0].token_ids)
            steps += 1
            if steps == 8:
                core.abort_request(["b"])
        return tokens

    expected, got = run(engine()), run(engine(COVERS_ALL))
    assert got == expected
    assert len(got["a"]) == len(got["c"]) == 30
    assert len(got["b"]) < 30
