"""The compiled operations on int4 pages: the reference's codes, one by one, and its outputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.by_device import cpu, reference
from tests.kernels.cache import PagedCache
from tests.kernels.test_operations import STEPS_WITH_DRAFTS, run_steps
from vllm_quest.formats.int4 import Int4Cache
from vllm_quest.page import Pages

# dtype, page size, head size, KV heads, group, bounds, groups of V; every kernel is compiled for each line.
INT4 = [
    (torch.float32, 8, 128, 2, 4, "int8", None),
    (torch.bfloat16, 16, 64, 1, 8, "int8", 32),
    (torch.float16, 32, 80, 3, 1, "bfloat16", None),
    (torch.bfloat16, 64, 96, 2, 3, "bfloat16", 32),
]
LENGTHS = [577, 1, 17, 63]
# Outputs differ by the order of float32 sums and one rounding to the output's dtype.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def new_cache(configuration: tuple, seed: int = 0) -> PagedCache:
    dtype, page_size, head_size, heads, _, bounds, group_size = configuration
    return PagedCache(
        num_blocks=40,
        num_kv_heads=heads,
        block_size=64,
        page_size=page_size,
        head_size=head_size,
        dtype=dtype,
        seed=seed,
        kv_dtype="int4",
        bounds_dtype=bounds,
        value_group_size=group_size,
    )


def assert_same_pages(pages: Pages, expected: Pages) -> None:
    """Every code and parameter of two int4 caches; unwritten parts hold the same poison."""
    for views in (pages, expected):
        assert isinstance(views.cache, Int4Cache)
    torch.testing.assert_close(
        (pages.summary, pages.cache.key[:2], pages.cache.value),
        (expected.summary, expected.cache.key[:2], expected.cache.value),
        rtol=0,
        atol=0,
        equal_nan=True,
    )


@pytest.mark.parametrize("configuration", INT4, ids=str)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(steps=STEPS_WITH_DRAFTS, seed=st.integers(0, 99))
def test_store_writes_the_references_codes(configuration, steps, seed) -> None:
    cache, expected = new_cache(configuration, seed), new_cache(configuration, seed)
    run_steps(cache, cpu.store, steps)
    run_steps(expected, reference.store, steps)
    assert_same_pages(cache.pages, expected.pages)


def test_long_prompts_are_cut_into_blocks() -> None:
    """Threads take whole blocks: chunks that begin inside a page, padding within a page and behind."""
    cache, expected = new_cache(INT4[1]), new_cache(INT4[1])
    slots = torch.cat([torch.arange(19, 300), torch.tensor([-1, -1]), torch.arange(300, 1100)])
    key, value = torch.randn(2, len(slots) + 3, 1, 64).bfloat16()
    padded = torch.nn.functional.pad(slots, (0, 3), value=-1)
    for views, ops in ((cache.pages, cpu), (expected.pages, reference)):
        ops.store(key[:20], value[:20], views, torch.arange(20))
        ops.store(key, value, views, padded)
    assert_same_pages(cache.pages, expected.pages)


@pytest.fixture(params=INT4, ids=str)
def case(request):
    """Four requests in scattered blocks, everything unwritten poison; their rows; a query."""
    dtype, _, head_size, heads, group, _, _ = request.param
    cache = new_cache(request.param)
    requests = [cache.new_request() for _ in LENGTHS]
    cache.append(cpu.store, {r: n // 2 for r, n in zip(requests, LENGTHS, strict=True)}, padding=2)
    cache.append(cpu.store, {r: n - n // 2 for r, n in zip(requests, LENGTHS, strict=True)})
    query = torch.from_numpy(cache.rng.standard_normal((len(LENGTHS), heads * group, head_size))).to(dtype)
    return cache, cache.rows(requests), query


def test_scores_are_the_references(case) -> None:
    cache, (table, _, num_pages), query = case
    arguments = (query, cache.pages.summary, table, num_pages, 0.3, "max")
    scores = cpu.score_pages(*arguments)
    torch.testing.assert_close(scores, reference.score_pages(*arguments), rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("budget", [3, 7, None])
def test_attention_is_the_references(case, budget) -> None:
    """Over selected pages and over every page, and over every page where a row is short."""
    cache, (table, seq_lens, num_pages), query = case
    size, scale = cache.layout.block.page_size, cache.layout.block.head_size**-0.5
    indices = None
    if budget is not None:
        scores = reference.score_pages(query, cache.pages.summary, table, num_pages, scale, "max")
        indices = reference.select_pages(scores, num_pages, budget, 1, 2)
    arguments = (query, cache.pages.cache, table, seq_lens, indices, size, scale)
    for min_context in (0, 100):
        out = cpu.attend_pages(*arguments, sparse_context=min_context)
        expected = reference.attend_pages(*arguments, sparse_context=min_context)
        torch.testing.assert_close(out, expected, rtol=TOLERANCE[query.dtype], atol=TOLERANCE[query.dtype])


def test_dequantized_blocks_are_the_references(case) -> None:
    cache, _, query = case
    _, heads, size, _ = cache.cache.shape
    context = cache.requests[0]
    blocks = torch.tensor(context.blocks, dtype=torch.int32)
    wanted = (len(context.keys) - torch.arange(len(blocks)) * size).clamp(0, size).int()
    wanted[2], wanted[3] = 0, size // 2 - 1
    outputs = []
    for ops in (cpu, reference):
        key = torch.full((len(blocks) + 1, heads, query.shape[2], size), torch.nan, dtype=query.dtype).mT
        value = torch.full((len(blocks) + 1, heads, size, query.shape[2]), torch.nan, dtype=query.dtype)
        ops.dequantize_blocks(cache.pages.cache, blocks, wanted, key, value)
        outputs.append((key, value))
    torch.testing.assert_close(*outputs, rtol=0, atol=0, equal_nan=True)
    assert outputs[0][0][:-1].isfinite().all()
    assert outputs[0][0][-1].isnan().all()
