"""Decode rows really select pages: which rows, which pages, and what the answers are."""

from __future__ import annotations

import types

import numpy as np
import pytest
from vllm import SamplingParams

import vllm_quest
from vllm_quest.backend import cpu as cpu_backend

pytestmark = pytest.mark.engine

LAYERS, KV_HEADS = 30, 3
QUARTER = {"token_budget": 512, "dense_layers": 2}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def passkey_prompt(llm, prose: list[int], key: str, depth: float, tokens: int = 2048) -> list[int]:
    tokenizer = llm.get_tokenizer()
    needle = tokenizer.encode(f"\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n")
    question = tokenizer.encode("\n\nWhat is the pass key? The pass key is")
    room = tokens - len(needle) - len(question)
    before = int(room * depth)
    return prose[:before] + needle + prose[before:room] + question


def generate(llm, prompts: list[list[int]], params=GREEDY) -> list[tuple[int, ...]]:
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return [tuple(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("depth", [0.1, 0.5, 0.8])
def test_pass_key_at_a_quarter_of_the_context(engine, prose, depth) -> None:
    llm = engine(QUARTER)
    prompt = passkey_prompt(llm, prose, "71432", depth)
    answer = llm.get_tokenizer().decode(generate(llm, [prompt])[0])
    assert answer.strip().startswith("71432")
    assert generate(llm, [prompt])[0][:6] == generate(engine(), [prompt])[0][:6]


def test_counters_say_what_happened(engine, prose) -> None:
    llm = engine(QUARTER)
    before = vllm_quest.read_counters()
    generate(llm, [prose[7000:8000], prose[9000:9100]])  # not in the prefix cache
    after = vllm_quest.read_counters()
    delta = {key: after[key] - before[key] for key in after}
    steps = GREEDY.max_tokens - 1  # the first token comes from prefill
    sparse_layers = LAYERS - QUARTER["dense_layers"]
    assert delta["decode_rows_sparse"] == steps * sparse_layers
    assert delta["decode_rows_dense_context"] == steps * sparse_layers
    assert delta["decode_rows_dense_layer"] == 2 * steps * QUARTER["dense_layers"]
    assert delta["prefill_tokens_dense"] == 1100 * LAYERS
    assert delta["pages_read"] == steps * sparse_layers * KV_HEADS * 32
    lengths = [1001 + step for step in range(steps)]
    pages = sum(-(-length // 16) for length in lengths)
    assert delta["pages_scored"] == pages * sparse_layers * KV_HEADS
    token_bytes = sparse_layers * KV_HEADS * 64 * 2 * 4
    assert delta["bytes_dense"] == sum(lengths) * token_bytes
    read = sum(32 * 16 - (-length) % 16 + -(-length // 16) for length in lengths)
    assert delta["bytes_read"] == read * token_bytes


def test_decode_stays_sparse_in_mixed_batches(engine, prose) -> None:
    """One request decodes while another's prompt comes in chunks; both as if they were alone."""
    prompts = [prose[:900], prose[3000:4900]]
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    llm = engine(QUARTER, max_num_batched_tokens=128, enable_prefix_caching=False)
    alone = [generate(llm, [prompt], params)[0] for prompt in prompts]
    seen = []
    build = cpu_backend.QuestCPUMetadataBuilder.build

    def record(self, *args, **kwargs):
        metadata = build(self, *args, **kwargs)
        seen.append((metadata.rows.sparse is not None, metadata.rows.counts.prefill_tokens > 0))
        return metadata

    before = vllm_quest.read_counters()["decode_rows_sparse"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_backend.QuestCPUMetadataBuilder, "build", record)
        together = generate(llm, prompts, params)
    assert together == alone
    assert seen.count((True, True)) >= 10, "some steps must be mixed"
    rows = vllm_quest.read_counters()["decode_rows_sparse"] - before
    assert rows == 2 * (params.max_tokens - 1) * (LAYERS - 2), "every decode row of both requests is sparse"


def test_min_context_keeps_decode_dense(engine, prose) -> None:
    llm = engine(QUARTER | {"min_context": 1006})
    before = vllm_quest.read_counters()
    generate(llm, [prose[:1000]])
    after = vllm_quest.read_counters()
    # 11 decode rows with contexts 1001 .. 1011: the last six are long enough.
    assert after["decode_rows_sparse"] - before["decode_rows_sparse"] == 6 * (LAYERS - 2)
    assert after["decode_rows_dense_context"] - before["decode_rows_dense_context"] == 5 * (LAYERS - 2)


@pytest.mark.parametrize("page_size", [8, 16, 64])
def test_engine_reads_the_pages_that_its_keys_ask_for(engine, prose, page_size) -> None:
    """Inside the engine: bounds equal those of the cached keys, and the selection is the best by them.

    Blocks are reused (few of them, several requests before), prompts are chunked and a prefix is cached.
    """
    quest = {"token_budget": 256, "page_size": page_size, "dense_layers": 0}
    llm = engine(quest, max_num_batched_tokens=200, num_gpu_blocks_override=12, max_model_len=1280)
    generate(llm, [prose[5000:5700], prose[6000:6400]])
    generate(llm, [prose[:600]])
    checked = []
    real = cpu_backend.QuestCPUImpl.kernels

    def score_pages(query, bounds, block_table, num_pages, scale, reduce):
        scores = real.score_pages(query, bounds, block_table, num_pages, scale, reduce)
        checked.append((query, bounds, block_table, num_pages, scores))
        return scores

    def attend_pages(query, key_cache, value_cache, block_table, seq_lens, pages, size, scale):
        check_step(*checked[-1], key_cache, seq_lens, pages, size)
        return real.attend_pages(query, key_cache, value_cache, block_table, seq_lens, pages, size, scale)

    spy = types.SimpleNamespace(**vars(real))
    spy.score_pages, spy.attend_pages = score_pages, attend_pages
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_backend.QuestCPUImpl, "kernels", spy)
        generate(llm, [prose[:600] + prose[700:1000]], SamplingParams(max_tokens=4, temperature=0))
    assert len(checked) == 3 * LAYERS


def check_step(query, bounds, block_table, num_pages, scores, key_cache, seq_lens, pages, size) -> None:
    per_block = key_cache.shape[2] // size
    group = query.shape[1] // KV_HEADS
    for row, length in enumerate(seq_lens.tolist()):
        keys = key_cache[block_table[row].long()].movedim(2, 1).flatten(0, 1)[:length].numpy()  # [T, H, D]
        stored = bounds[block_table[row].long()].movedim(2, 1).flatten(0, 1).numpy()  # [pages, H, 2, D]
        starts = range(0, length, size)
        for page, start in enumerate(starts):
            np.testing.assert_array_equal(stored[page, :, 0], keys[start : start + size].min(0))
            np.testing.assert_array_equal(stored[page, :, 1], keys[start : start + size].max(0))
        assert len(starts) == num_pages[row] <= block_table.shape[1] * per_block
        for head in range(KV_HEADS):
            q = query[row, head * group : (head + 1) * group].double().numpy()
            low, high = (
                stored[: len(starts), head, 0].astype(float),
                stored[: len(starts), head, 1].astype(float),
            )
            best = np.maximum(q[:, None] * low, q[:, None] * high).sum(-1).max(0)
            np.testing.assert_allclose(
                scores[row, head, : len(starts)].numpy(), best, rtol=1e-4, atol=1e-5 * best.max()
            )
            chosen = [page for page in pages[row, head].tolist() if page >= 0]
            forced = {0, len(starts) - 2, len(starts) - 1}
            assert len(chosen) == 256 // size
            assert forced <= set(chosen)
            worst_chosen = min(best[page] for page in chosen if page not in forced)
            skipped = [best[page] for page in range(len(starts)) if page not in chosen]
            assert worst_chosen >= max(skipped) - 1e-4 * abs(max(skipped))


def test_speculated_tokens_select_for_themselves(engine, prose) -> None:
    """Drafts are verified as rows of their own: the tokens are those of decoding one by one."""
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    prompts = [prose[5000:5900], prose[3000:3040] * 20]
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
    llm = engine(QUARTER, speculative_config=speculation)
    speculated = generate(llm, prompts, params)
    accepted = sum(m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_accepted_tokens")
    assert accepted > 10
    assert speculated == generate(engine(QUARTER), prompts, params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_models(engine, prose, dtype) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    prompts = [prose[:300], prose[400:440]]
    dense = generate(engine(dtype=dtype, max_model_len=512), prompts, params)
    covers_all = generate(engine({"token_budget": 512}, dtype=dtype, max_model_len=512), prompts, params)
    assert covers_all == dense
    before = vllm_quest.read_counters()["decode_rows_sparse"]
    sparse = engine({"token_budget": 128, "dense_layers": 0}, dtype=dtype, max_model_len=512)
    assert len(generate(sparse, prompts, params)[0]) == 8
    assert vllm_quest.read_counters()["decode_rows_sparse"] - before == 7 * LAYERS
