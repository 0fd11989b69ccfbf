"""4-bit pages on the GPU backend: what prefill and decode rows see, through the interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.backend import test_int4
from tests.backend.harness import BLOCK_SIZE, Engine, inputs
from tests.backend.test_gpu import Backend
from tests.backend.test_int4 import attention, decoded, stored

# The interpreter computes masked lanes too, and numpy warns of what it finds there.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

DENSE, INT4 = (quest | {"page_size": 16} for quest in (test_int4.DENSE, test_int4.INT4))


def assert_reads(output: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    torch.testing.assert_close(output, attention(query, keys, values), rtol=1e-4, atol=1e-5)


def test_the_first_chunk_is_the_dense_result_to_the_bit() -> None:
    work = [(0, 40, True), (1, 17, True)]
    dense, int4 = (Engine(Backend, quest) for quest in (DENSE, INT4))
    for expected, out in zip(dense.step(work, 0), int4.step(work, 0), strict=True):
        assert torch.equal(out, expected)


def test_later_chunks_see_the_stored_context_and_themselves_as_they_are() -> None:
    engine = Engine(Backend, INT4)
    engine.step([(0, 53, True), (3, 40, True)], seed=0)
    outputs = engine.step([(3, 1, False), (0, 30, True)], seed=1)
    for layer, output in enumerate(outputs):
        query, key, value = inputs(31, layer, seed=1)
        assert_reads(output[:1], query[:1], *decoded(engine, layer, request=3))
        keys, values = stored(engine, layer, request=0)
        keys, values = torch.cat((keys[:53], key[1:])), torch.cat((values[:53], value[1:]))
        assert_reads(output[1:], query[1:], keys, values)


def test_prompts_that_do_not_fit_together_take_turns() -> None:
    """Four prompts and a decoding request, in a buffer of 1,024 tokens."""
    engine = Engine(Backend, INT4)
    assert len(engine.builder.prefill.kv) == 1024 // BLOCK_SIZE
    engine.step([(0, 30, True)], seed=0)
    prompts = (1, 2, 3, 4)
    for request in prompts:
        engine.step([(request, 290 + request, True)], seed=request)
    outputs = engine.step([(0, 1, False), *((request, 15, True) for request in prompts)], seed=9)
    for layer, output in enumerate(outputs):
        query, key, value = inputs(61, layer, seed=9)
        assert_reads(output[:1], query[:1], *decoded(engine, layer, 0))
        for place, request in enumerate(prompts):
            new = slice(1 + 15 * place, 1 + 15 * (place + 1))
            keys, values = stored(engine, layer, request)
            keys, values = torch.cat((keys[:-15], key[new])), torch.cat((values[:-15], value[new]))
            assert_reads(output[new], query[new], keys, values)


def test_short_contexts_and_dense_layers_read_everything() -> None:
    engine = Engine(Backend, INT4 | {"token_budget": 48, "dense_layers": 1, "min_context": 60})
    engine.step([(0, 55, True), (2, 110, True)], seed=0)
    outputs = engine.step([(0, 1, False), (2, 1, False)], seed=1)
    for layer, output in enumerate(outputs):
        query, _, _ = inputs(2, layer, seed=1)
        for row, request in enumerate((0, 2)):
            expected = attention(query[row, None], *decoded(engine, layer, request))[0]
            is_dense = layer == 0 or request == 0
            assert torch.allclose(output[row], expected, rtol=1e-4, atol=1e-5) == is_dense


def test_drafts_see_what_single_tokens_see_but_for_the_residual() -> None:
    """The rows before a draft's last one have a shorter context, whose page may have gone on by then."""
    engine = Engine(Backend, INT4, speculated=2)
    engine.step([(0, 45, True)], seed=0)
    outputs = engine.step([(0, 3, False)], seed=1)
    for layer, output in enumerate(outputs):
        query, _, _ = inputs(3, layer, seed=1)
        keys, values = decoded(engine, layer, 0)
        for row in range(3):
            seen = len(keys) - 2 + row
            assert_reads(output[row, None], query[row, None], keys[:seen], values[:seen])
