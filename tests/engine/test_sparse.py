"""Decode rows really select pages: which rows, which pages, and what the answers are."""

from __future__ import annotations

import pytest
from vllm import SamplingParams

import vllm_quest
from tests.engine.running import DEFAULTS, GREEDY, KV_HEADS, LAYERS, QUARTER, generate

pytestmark = pytest.mark.engine


def passkey_prompt(llm, prose: list[int], key: str, depth: float, tokens: int = 2048) -> list[int]:
    tokenizer = llm.get_tokenizer()
    needle = tokenizer.encode(f"\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n")
    question = tokenizer.encode("\n\nWhat is the pass key? The pass key is")
    room = tokens - len(needle) - len(question)
    before = int(room * depth)
    return prose[:before] + needle + prose[before:room] + question


@pytest.mark.parametrize("quest", [DEFAULTS, QUARTER])
@pytest.mark.parametrize("depth", [0.1, 0.5, 0.8])
def test_pass_key_at_a_quarter_of_the_context(engine, prose, quest, depth) -> None:
    llm = engine(quest)
    prompt = passkey_prompt(llm, prose, "71432", depth)
    answer = llm.get_tokenizer().decode(generate(llm, [prompt])[0])
    assert answer.strip().startswith("71432")
    assert generate(llm, [prompt])[0][:6] == generate(engine(), [prompt])[0][:6]


@pytest.mark.parametrize(
    ("quest", "page_size", "bounds_bytes", "dense_layers"),
    [
        pytest.param(DEFAULTS, 8, 2 * 64 + 8, 0, id="8-bit bounds and their offset and scale"),
        pytest.param(QUARTER, 16, 2 * 64 * 4, 2, id="float32 bounds"),
    ],
)
def test_counters_say_what_happened(engine, prose, quest, page_size, bounds_bytes, dense_layers) -> None:
    llm = engine(quest)
    before = vllm_quest.read_counters()
    generate(llm, [prose[7000:8000], prose[9000:9100]])  # not in the prefix cache
    after = vllm_quest.read_counters()
    delta = {key: after[key] - before[key] for key in after}
    steps = GREEDY.max_tokens - 1  # the first token comes from prefill
    sparse_layers = LAYERS - dense_layers
    assert delta["decode_rows_sparse"] == steps * sparse_layers
    assert delta["decode_rows_dense_context"] == steps * sparse_layers
    assert delta["decode_rows_dense_layer"] == 2 * steps * dense_layers
    assert delta["prefill_tokens_dense"] == 1100 * LAYERS
    assert delta["pages_read"] == steps * sparse_layers * KV_HEADS * 512 // page_size
    lengths = [1001 + step for step in range(steps)]
    pages = sum(-(-length // page_size) for length in lengths)
    assert delta["pages_scored"] == pages * sparse_layers * KV_HEADS
    token_bytes = 64 * 2 * 4
    assert delta["bytes_dense"] == sum(lengths) * token_bytes * sparse_layers * KV_HEADS
    tokens = sum(512 - (-length) % page_size for length in lengths)
    assert delta["bytes_read"] == (tokens * token_bytes + pages * bounds_bytes) * sparse_layers * KV_HEADS


def test_decode_stays_sparse_in_mixed_batches(engine, prose) -> None:
    """One request decodes while another's prompt comes in chunks; both as if they were alone."""
    prompts = [prose[:900], prose[3000:4900]]
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    llm = engine(QUARTER, max_num_batched_tokens=128, enable_prefix_caching=False)
    alone = [generate(llm, [prompt], params)[0] for prompt in prompts]
    before = vllm_quest.read_counters()["decode_rows_sparse"]
    together, mixed = step_by_step(llm, prompts, params)
    assert together == alone
    assert mixed >= 10, "some steps must be mixed"
    rows = vllm_quest.read_counters()["decode_rows_sparse"] - before
    assert rows == 2 * (params.max_tokens - 1) * (LAYERS - 2), "every decode row of both requests is sparse"


def step_by_step(llm, prompts: list[list[int]], params: SamplingParams) -> tuple[list[tuple[int, ...]], int]:
    """The token ids of every prompt, and how many steps had sparse rows and prefill."""
    engine, answers, mixed = llm.llm_engine, {}, 0
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        before = vllm_quest.read_counters()
        for output in engine.step():
            if output.finished:
                answers[output.request_id.split("-")[0]] = tuple(output.outputs[0].token_ids)
        after = vllm_quest.read_counters()
        mixed += all(after[key] > before[key] for key in ("decode_rows_sparse", "prefill_tokens_dense"))
    return [answers[str(number)] for number in range(len(prompts))], mixed


def test_min_context_keeps_decode_dense(engine, prose) -> None:
    llm = engine(QUARTER | {"min_context": 1006})
    before = vllm_quest.read_counters()
    generate(llm, [prose[:1000]])
    after = vllm_quest.read_counters()
    # 11 decode rows with contexts 1001 .. 1011: the last six are long enough.
    assert after["decode_rows_sparse"] - before["decode_rows_sparse"] == 6 * (LAYERS - 2)
    assert after["decode_rows_dense_context"] - before["decode_rows_dense_context"] == 5 * (LAYERS - 2)
