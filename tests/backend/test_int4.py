"""4-bit pages on the CPU backend: what prefill and decode rows see, and how requests share the workspace."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from tests.backend.harness import BLOCK_SIZE, HEADS, KV_HEADS, SCALE, Engine, inputs
from vllm_quest.backend.counting import StepCounts
from vllm_quest.backend.cpu import QuestCPUBackend
from vllm_quest.backend.prefill import take_turns
from vllm_quest.config import QuestConfig
from vllm_quest.formats.int4.reference import dequantized, filling_pages
from vllm_quest.page import PageLayout

PAGE_SIZE = 8
DENSE = {"token_budget": None, "page_size": PAGE_SIZE}
INT4 = DENSE | {"kv_dtype": "int4"}


def stored(engine: Engine, layer: int, request: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a request as its pages hold them and prefill reads them, ``[tokens, H, D]``."""
    pages = engine.builder.layout.views(engine.caches[layer])
    blocks = engine.tables[request].long()
    keys, values = (
        cache[blocks].transpose(1, 2).flatten(0, 1)[: engine.lengths[request]]
        for cache in dequantized(pages.cache)
    )
    return keys, values


def decoded(engine: Engine, layer: int, request: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `stored`, but as decoding reads them: the page being filled from 8 bits."""
    keys, values = stored(engine, layer, request)
    pages = engine.builder.layout.views(engine.caches[layer])
    table, seq_lens = engine.tables[request][None], torch.tensor([len(keys)])
    page_size = engine.builder.layout.block.page_size
    first = (len(keys) - 1) // page_size * page_size
    last = filling_pages(pages.cache, table, seq_lens)  # [1, H, S, D] each
    last_keys, last_values = (part[0].transpose(0, 1)[: len(keys) - first] for part in last)
    return torch.cat((keys[:first], last_keys)), torch.cat((values[:first], last_values))


def attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last tokens of a context, ``[tokens, Hq, D]``, in float64."""
    visible = torch.ones(len(query), len(keys), dtype=torch.bool).tril(len(keys) - len(query))
    q, k, v = (tensor.double().transpose(0, 1) for tensor in (query, keys, values))
    k, v = (tensor.repeat_interleave(HEADS // KV_HEADS, 0) for tensor in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=SCALE)
    return out.transpose(0, 1).float()


@pytest.mark.parametrize("bounds_dtype", ["auto", "bfloat16"])
def test_the_first_chunk_is_the_dense_result_to_the_bit(bounds_dtype) -> None:
    work = [[(0, 100, True), (1, 17, True)], [(2, 1, True)]]
    dense, int4 = (
        Engine(QuestCPUBackend, quest, poison=1e3) for quest in (DENSE, INT4 | {"bounds_dtype": bounds_dtype})
    )
    for seed, step in enumerate(work):
        for expected, out in zip(dense.step(step, seed), int4.step(step, seed), strict=True):
            assert torch.equal(out, expected)


@pytest.mark.parametrize("bounds_dtype", ["auto", "bfloat16"])
def test_later_chunks_see_the_stored_context_and_themselves_as_they_are(bounds_dtype) -> None:
    engine = Engine(QuestCPUBackend, INT4 | {"bounds_dtype": bounds_dtype})
    engine.step([(0, 101, True), (3, 40, True)], seed=0)
    outputs = engine.step([(3, 1, False), (0, 70, True)], seed=1)
    for layer, output in enumerate(outputs):
        query, key, value = inputs(71, layer, seed=1)
        keys, values = decoded(engine, layer, request=3)
        torch.testing.assert_close(output[:1], attention(query[:1], keys, values), rtol=1e-4, atol=1e-5)
        keys, values = stored(engine, layer, request=0)
        keys, values = torch.cat((keys[:101], key[1:])), torch.cat((values[:101], value[1:]))
        torch.testing.assert_close(output[1:], attention(query[1:], keys, values), rtol=1e-4, atol=1e-5)


def test_prompts_that_do_not_fit_together_take_turns() -> None:
    engine = Engine(QuestCPUBackend, INT4)
    assert len(engine.builder.prefill.kv) == 1024 // BLOCK_SIZE
    for request in range(4):
        engine.step([(request, 300 - request, True)], seed=request)  # together more than 1,024 tokens
    outputs = engine.step([(request, 15, True) for request in range(4)], seed=9)
    for layer, output in enumerate(outputs):
        query, key, value = inputs(60, layer, seed=9)
        for request in range(4):
            new = slice(15 * request, 15 * (request + 1))
            keys, values = stored(engine, layer, request)
            keys, values = torch.cat((keys[:-15], key[new])), torch.cat((values[:-15], value[new]))
            expected = attention(query[new], keys, values)
            torch.testing.assert_close(output[new], expected, rtol=1e-4, atol=1e-5)


def test_short_contexts_and_dense_layers_read_everything() -> None:
    sparse = INT4 | {"token_budget": 48, "dense_layers": 1, "min_context": 120}
    engine = Engine(QuestCPUBackend, sparse)
    engine.step([(0, 110, True), (1, 30, True), (2, 290, True)], seed=0)
    outputs = engine.step([(0, 1, False), (1, 1, False), (2, 1, False)], seed=1)
    for layer, output in enumerate(outputs):
        query, _, _ = inputs(3, layer, seed=1)
        for request in range(3):
            keys, values = decoded(engine, layer, request)
            expected = attention(query[request, None], keys, values)[0]
            is_dense = layer == 0 or request < 2
            assert torch.allclose(output[request], expected, rtol=1e-4, atol=1e-5) == is_dense


@pytest.mark.parametrize(
    ("bounds_dtype", "words"),
    [
        ("auto", "101 B (int4), bounds of 8 tokens 136 B (int8)"),
        ("bfloat16", "116 B (int4), bounds of 8 tokens 256 B (bfloat16)"),
    ],
)
def test_the_start_up_line_names_the_bounds(start_up_lines, bounds_dtype, words) -> None:
    Engine(QuestCPUBackend, INT4 | {"bounds_dtype": bounds_dtype})
    assert words in start_up_lines[0]


def test_what_a_sparse_row_reads() -> None:
    """Codes and parameters of the selected tokens, all bounds and the selected ones again, two residuals."""
    config = QuestConfig.from_dict({"token_budget": 64, "page_size": 16, "kv_dtype": "int4"})
    layout = PageLayout.configured(config, 128, 128, torch.float32, for_cpu=True)
    counts: Counter[str] = Counter()
    counters = SimpleNamespace(add=lambda name, count: counts.update({name: count}))
    StepCounts.of(config, 0, 2, torch.tensor([200, 333])).add_sparse_layer(counters, 3, layout)
    tokens, pages, read = 64 - 8 + 64 - 3, 13 + 21, 4 + 4
    assert counts["bytes_read"] == 3 * (tokens * 132 + (pages + read) * 264 + 2 * 2 * 8 * 128)


def test_turns_hold_each_block_once_and_keep_to_the_capacity() -> None:
    seq_lens, query_lens = torch.tensor([70, 1, 33, 200, 64]), torch.tensor([6, 1, 33, 50, 1])
    table = torch.arange(60, dtype=torch.int32).view(6, 10)
    requests = torch.tensor([0, 2, 3, 4, 5])
    turns = list(take_turns(requests, seq_lens, query_lens, table, 32, capacity=7))
    assert [turn.requests.tolist() for turn in turns] == [[0, 2, 3], [4], [5]]
    assert turns[0].blocks.tolist() == [0, 1, 2, 20, 30, 31]
    assert turns[0].num_tokens.tolist() == [32, 32, 0, 0, 0, 0]
    assert turns[0].block_table[:, :2].tolist() == [[0, 1], [3, 4], [4, 5]]
    assert turns[0].slots.tolist() == [*range(64, 70), 96, *range(128, 161)]
    assert turns[1].num_tokens.tolist() == [32, 32, 32, 32, 22, 0, 0]
    assert turns[1].slots.tolist() == [*range(150, 200)]
    assert turns[2].num_tokens.tolist() == [32, 31]
