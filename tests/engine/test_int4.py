"""4-bit pages in a running engine: vLLM's own figures of capacity, prefix hits, preemption, a pass key."""

from __future__ import annotations

import pytest
import torch
from vllm import SamplingParams

from tests.engine.running import GREEDY, KV_HEADS, LAYERS, generate, metric
from tests.engine.spies import INT4, SPIED
from tests.engine.test_sparse import passkey_prompt
from vllm_quest import read_counters
from vllm_quest.formats.int4.reference import key_steps, unpack
from vllm_quest.kernels.bounds import read_bounds

pytestmark = pytest.mark.engine

BLOCK_SIZE = 128

DENSE = {"kv_dtype": "int4", "token_budget": None, "page_size": 16}
SPARSE = {"kv_dtype": "int4", "token_budget": 512, "page_size": 16, "dense_layers": 2}


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


def test_pages_hold_what_was_stored(engine, prose) -> None:
    """Under prefix hits, preemption and reuse of blocks, one layer's 4-bit keys are the keys that came in.

    Codes are wrong by half a step at most when a page is quantized at once, and by a sixteenth of that more
    for each time its range has grown; uniform errors have an RMS of 0.289 steps.
    """
    # Two blocks of each prompt are common. Sixteen blocks take seven prompts in, and none of them further.
    prompts = [prose[:300] + prose[1000 + i * 700 :][: 195 + i] for i in range(8)]
    tight = engine(
        SPARSE | {"kv_dtype": SPIED},
        max_num_batched_tokens=256,
        max_model_len=1536,
        num_gpu_blocks_override=17,
    )
    stored: dict[int, dict[int, torch.Tensor]] = {}  # by layer, then slot
    errors: list[torch.Tensor] = []

    def on_store(key, value, cache, slot_mapping) -> None:
        for slot, vector in zip(slot_mapping.tolist(), key, strict=False):
            stored.setdefault(cache.key.codes.data_ptr(), {})[slot] = vector.clone()

    def on_attend(query, cache, block_table, seq_lens, *rest) -> None:
        if cache.key.codes.data_ptr() == next(iter(stored)) and len(errors) < 60:
            row = len(errors) % len(query)
            errors.append(errors_in_steps(cache.key, block_table[row], int(seq_lens[row]), stored))

    INT4.on_store, INT4.on_attend = on_store, on_attend
    try:
        generate(tight, prompts, SamplingParams(max_tokens=60, temperature=0, ignore_eos=True))
    finally:
        INT4.on_store = INT4.on_attend = None
    assert metric(tight, "vllm:num_preemptions") > 0
    assert metric(tight, "vllm:prefix_cache_hits") > 0
    assert len(errors) == 60
    for error in errors:
        assert error.abs().max() < 0.5 + 15 / 32
        assert error.square().mean().sqrt() < 1.1 * 0.289


def errors_in_steps(key_cache, blocks: torch.Tensor, seq_len: int, stored: dict) -> torch.Tensor:
    """How far each element of a context's keys is from what was stored, ``[tokens, H, D]``."""
    slots = [int(blocks[t // BLOCK_SIZE]) * BLOCK_SIZE + t % BLOCK_SIZE for t in range(seq_len)]
    written = torch.stack([stored[key_cache.codes.data_ptr()][slot] for slot in slots])
    blocks = blocks[: -(-seq_len // BLOCK_SIZE)].long()
    zero, step = key_steps(read_bounds(key_cache.bounds, blocks))  # [blocks, H, P, 1, D]
    codes = unpack(key_cache.codes[blocks]).float()
    error = (zero + step * codes).flatten(2, 3).transpose(1, 2).flatten(0, 1)[:seq_len] - written
    steps = step.expand_as(codes).flatten(2, 3).transpose(1, 2).flatten(0, 1)[:seq_len]
    return error / steps.clamp(min=1e-6)


def test_a_pass_key_survives(engine, prose) -> None:
    """Read by 4-bit decode rows: the prompt's own chunk sees it at full precision, and gives one token."""
    before = read_counters()
    for quest in (DENSE, SPARSE):
        llm = engine(quest)
        prompt = passkey_prompt(llm, prose, "71432", 0.5)
        answer = llm.get_tokenizer().decode(generate(llm, [prompt])[0])
        assert answer.strip().startswith("71432")
    grown = {name: value - before[name] for name, value in read_counters().items()}
    steps = GREEDY.max_tokens - 1
    assert grown["decode_rows_sparse"] == steps * (LAYERS - 2)
    assert grown["decode_rows_dense_budget"] == steps * LAYERS
    # A quarter of the context, in less than half of its float32 bytes, the bounds of all pages included.
    assert grown["bytes_read"] < grown["bytes_dense"] / 8


def test_decoding_is_the_same_in_any_company(engine, prose) -> None:
    prompts = [prose[:900], prose[2000:2033], prose[4000:5100]]
    llm = engine(SPARSE)
    assert generate(llm, prompts, GREEDY) == [generate(llm, [prompt], GREEDY)[0] for prompt in prompts]
