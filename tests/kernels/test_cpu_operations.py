"""The compiled CPU operations against the reference: dtypes, page sizes, groups, head sizes, odd lengths."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.by_device import cpu, reference
from tests.kernels.cache import PagedCache

# dtype, block size, page size, head size, KV heads, group, bounds. A line compiles four kernels, so each
# value appears once or twice and not every combination.
CONFIGURATIONS = [
    (torch.float32, 32, 16, 128, 2, 4, "auto"),
    (torch.bfloat16, 32, 8, 112, 3, 3, "auto"),
    (torch.float16, 64, 32, 80, 1, 16, "int8"),
    (torch.bfloat16, 64, 64, 256, 2, 8, "auto"),
    (torch.float32, 128, 16, 64, 1, 1, "auto"),
    (torch.float32, 128, 8, 128, 2, 4, "int8"),
]
LENGTHS = [577, 1, 17, 63]
# Outputs differ by the order of float32 sums and one rounding to the output's dtype.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture(
    params=CONFIGURATIONS, ids=lambda c: f"{str(c[0])[6:]}-{c[1]}-{c[2]}-{c[3]}-{c[4]}x{c[5]}-{c[6]}"
)
def case(request):
    """A cache with four requests in scattered blocks, everything unwritten NaN; their rows; a query."""
    dtype, block_size, page_size, head_size, heads, group, bounds_dtype = request.param
    cache = PagedCache(
        num_blocks=40,
        num_kv_heads=heads,
        block_size=block_size,
        page_size=page_size,
        head_size=head_size,
        dtype=dtype,
        bounds_dtype=bounds_dtype,
    )
    requests = [cache.new_request() for _ in LENGTHS]
    # Prefill in two chunks, the first of which ends inside a page, and one decode token.
    cache.append(cpu.store, {r: n // 2 for r, n in zip(requests, LENGTHS, strict=True)}, padding=2)
    cache.append(cpu.store, {r: n - n // 2 - 1 for r, n in zip(requests, LENGTHS, strict=True)})
    cache.append(cpu.store, dict.fromkeys(requests, 1), padding=1)
    query = torch.from_numpy(cache.rng.standard_normal((len(LENGTHS), heads * group, head_size))).to(dtype)
    return cache, cache.rows(requests), query


def test_store_writes_what_the_reference_writes(case) -> None:
    cache, _, _ = case
    expected = torch.empty_like(cache.cache)
    expected.view(torch.uint8).fill_(255)
    pages = cache.layout.views(expected)
    heads, head_size, size = cache.cache.shape[1], cache.layout.block.head_size, cache.layout.block.block_size
    for context in cache.requests.values():
        position = torch.arange(len(context.keys))
        slots = torch.tensor(context.blocks)[position // size] * size + position % size
        key, value = (
            torch.tensor([t.tolist() for t in tokens]).view(-1, heads, head_size).to(expected.dtype)
            for tokens in (context.keys, context.values)
        )
        reference.store(key, value, pages, slots)
    torch.testing.assert_close(cache.cache, expected, rtol=0, atol=0, equal_nan=True)


def test_scores_are_the_references(case) -> None:
    assert_scores_are_the_references(case, "max")


@pytest.mark.parametrize("case", [CONFIGURATIONS[0], CONFIGURATIONS[2]], indirect=True)
@pytest.mark.parametrize("reduce", ["mean", "softmax_mean"])
def test_other_reductions_are_the_references(case, reduce) -> None:
    assert_scores_are_the_references(case, reduce)


def assert_scores_are_the_references(case, reduce: str) -> None:
    cache, (table, _, num_pages), query = case
    arguments = (query, cache.pages.summary, table, num_pages, 0.3, reduce)
    torch.testing.assert_close(
        cpu.score_pages(*arguments), reference.score_pages(*arguments), rtol=1e-5, atol=3e-5
    )


@pytest.mark.parametrize("budget", [3, 7, 200])
def test_attention_is_the_references(case, budget) -> None:
    cache, (table, seq_lens, num_pages), query = case
    size, scale = cache.layout.block.page_size, cache.layout.block.head_size**-0.5
    scores = reference.score_pages(query, cache.pages.summary, table, num_pages, scale, "max")
    indices = reference.select_pages(scores, num_pages, budget, 1, 2)
    assert torch.equal(cpu.select_pages(scores, num_pages, budget, 1, 2), indices)
    arguments = (query, cache.pages.cache, table, seq_lens, indices, size, scale)
    out = cpu.attend_pages(*arguments)
    expected = reference.attend_pages(*arguments)
    torch.testing.assert_close(out, expected, rtol=TOLERANCE[query.dtype], atol=TOLERANCE[query.dtype])


def test_attention_over_every_page_is_dense(case) -> None:
    cache, (table, seq_lens, num_pages), query = case
    heads, size = cache.cache.shape[1], cache.layout.block.page_size
    indices = torch.arange(int(num_pages.max()), dtype=torch.int32).repeat(len(query), heads, 1)
    indices = indices.where(indices < num_pages[:, None, None], -1)
    out = cpu.attend_pages(query, cache.pages.cache, table, seq_lens, indices, size, 0.2)
    for row, context in enumerate(cache.requests.values()):
        keys, values = (
            torch.tensor([t.tolist() for t in tokens])
            .view(len(context.keys), heads, -1)
            .movedim(1, 0)
            .double()
            for tokens in (context.keys, context.values)
        )
        queries = query[row].double().view(heads, -1, query.shape[2])
        expected = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, scale=0.2)
        torch.testing.assert_close(
            out[row], expected.flatten(0, 1).to(query.dtype), rtol=TOLERANCE[query.dtype], atol=2e-6
        )


def test_every_page_without_a_list(case) -> None:
    cache, (table, seq_lens, _), query = case
    indices = torch.zeros(len(query), cache.cache.shape[1], 3, dtype=torch.int32)  # page 0, and again
    size, views = cache.layout.block.page_size, cache.pages
    arguments = (query, views.cache, table, seq_lens)
    expected = reference.attend_pages(*arguments, None, size, 0.2)
    tolerance = TOLERANCE[query.dtype]
    for pages, min_context in ((None, 0), (indices, 2**20)):
        out = cpu.attend_pages(*arguments, pages, size, 0.2, sparse_context=min_context)
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


def test_rows_are_independent(case) -> None:
    """One row alone is cut into chunks of pages, many rows are not: the parts must add up to the same."""
    cache, (table, seq_lens, num_pages), query = case
    size, scale = cache.layout.block.page_size, cache.layout.block.head_size**-0.5
    scores = cpu.score_pages(query, cache.pages.summary, table, num_pages, scale, "max")
    indices = cpu.select_pages(scores, num_pages, 60, 1, 2)
    together = cpu.attend_pages(query, cache.pages.cache, table, seq_lens, indices, size, scale)
    for row in range(len(query)):
        one = slice(row, row + 1)
        alone = cpu.attend_pages(
            query[one],
            cache.pages.cache,
            table[one],
            seq_lens[one],
            indices[one],
            size,
            scale,
        )
        tolerance = TOLERANCE[query.dtype]
        torch.testing.assert_close(alone, together[one], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(
            cpu.score_pages(query[one], cache.pages.summary, table[one], num_pages[one], scale, "max"),
            scores[one],
            rtol=0,
            atol=0,
        )


def test_missing_pages_may_stand_anywhere(case) -> None:
    cache, (table, seq_lens, _), query = case
    size, heads = cache.layout.block.page_size, cache.cache.shape[1]
    views = cache.pages
    # The first row's pages 0 and 2 with gaps around them, the second row's only page, nothing for the others.
    indices = torch.full((len(query), heads, 40), -1, dtype=torch.int32)
    indices[0, :, 3], indices[0, :, 39], indices[1, :, 20] = 0, 2, 0
    out = cpu.attend_pages(query, views.cache, table, seq_lens, indices, size, 0.2)
    expected = reference.attend_pages(query[:2], views.cache, table[:2], seq_lens[:2], indices[:2], size, 0.2)
    tolerance = TOLERANCE[query.dtype]
    torch.testing.assert_close(out[:2], expected, rtol=tolerance, atol=tolerance)
    assert not out[2:].any()


def test_no_rows_and_no_tokens(case) -> None:
    cache, (table, seq_lens, num_pages), query = case
    views, heads, dim = cache.pages, cache.cache.shape[1], query.shape[2]
    before = cache.cache.clone()
    nothing = torch.empty(0, heads, dim, dtype=query.dtype)
    cpu.store(nothing, nothing, views, torch.empty(0, dtype=torch.int64))
    torch.testing.assert_close(cache.cache, before, rtol=0, atol=0, equal_nan=True)
    scores = cpu.score_pages(query[:0], views.summary, table[:0], num_pages[:0], 1.0, "max")
    indices = cpu.select_pages(scores, num_pages[:0], 4, 1, 2)
    out = cpu.attend_pages(
        query[:0], views.cache, table[:0], seq_lens[:0], indices, cache.layout.block.page_size, 1.0
    )
    assert out.shape == (0, query.shape[1], dim)
