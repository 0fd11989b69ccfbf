"""The four operations against the slow oracle, under random sequences of what an engine does to a cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import oracle
from tests.kernels.by_device import cpu, reference
from tests.kernels.cache import PagedCache
from vllm_quest.kernels.bounds import read_bounds

IMPLEMENTATIONS = [pytest.param(reference, id="reference"), pytest.param(cpu, id="cpu")]

ACTIONS = ["append", "append", "append", "new", "share", "finish"]


def histories(*actions: str) -> st.SearchStrategy:
    """Steps of a serving engine: how many tokens up to three requests get, which one ends, what is shared."""
    return st.lists(
        st.tuples(
            st.sampled_from(actions),
            st.lists(st.sampled_from([1, 1, 1, 2, 7, 8, 17, 33]), min_size=1, max_size=3),
            st.integers(0, 3),
            st.integers(0, 2),
        ),
        min_size=3,
        max_size=14,
    )


STEPS = histories(*ACTIONS)
STEPS_WITH_DRAFTS = histories(*ACTIONS, "reject")


def run_steps(cache: PagedCache, store, steps) -> None:
    cache.new_request()
    for action, counts, pick, padding in steps:
        live = list(cache.requests)
        if action == "new" and len(live) < 3:
            cache.new_request()
        elif action == "share" and len(live) < 3:
            cache.new_request(prefix_of=live[pick % len(live)], prefix_blocks=1 + pick)
        elif action == "finish" and len(live) > 1:
            cache.finish(live[pick % len(live)])
        elif action == "reject":
            cache.reject(live[pick % len(live)], counts[0])
        room = len(cache.free) * cache.layout.block.block_size - 3 * cache.layout.block.block_size
        targets = dict(zip(cache.requests, counts, strict=False))
        if sum(targets.values()) < room:
            cache.append(store, targets, padding)


def assert_bounds(cache: PagedCache) -> None:
    size = cache.layout.block.page_size
    for context in cache.requests.values():
        for page in range(context.num_pages(size)):
            block, within = divmod(page, cache.layout.block.pages)
            stored = cache.pages.summary.values[context.blocks[block], :, within].float().numpy()
            kmin, kmax = oracle.page_bounds(context, page, size)
            np.testing.assert_array_equal(stored[:, 0], kmin)
            np.testing.assert_array_equal(stored[:, 1], kmax)


@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(steps=STEPS, page_size=st.sampled_from([8, 16, 32]))
def test_bounds_follow_every_write(ops, steps, page_size) -> None:
    cache = PagedCache(page_size=page_size)
    run_steps(cache, ops.store, steps)
    assert_bounds(cache)


@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(steps=STEPS, page_size=st.sampled_from([8, 16]))
def test_8_bit_bounds_are_a_step_wider_at_most(ops, steps, page_size) -> None:
    cache = PagedCache(page_size=page_size, bounds_dtype="int8")
    run_steps(cache, ops.store, steps)
    bounds = read_bounds(cache.pages.summary, torch.arange(len(cache.cache)))
    for context in cache.requests.values():
        for page in range(context.num_pages(page_size)):
            block, within = divmod(page, cache.layout.block.pages)
            stored = bounds[context.blocks[block], :, within].numpy()
            kmin, kmax = oracle.page_bounds(context, page, page_size)
            span = kmax.max(-1, keepdims=True) - kmin.min(-1, keepdims=True)
            outward = np.stack((kmin - stored[:, 0], stored[:, 1] - kmax))
            assert (outward >= -1e-6 * span).all()
            assert (outward <= 1.001 / 255 * span).all()


@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    steps=STEPS,
    reduce=st.sampled_from(["max", "mean", "softmax_mean"]),
    budget=st.integers(3, 9),
    seed=st.integers(0, 9),
)
def test_decode_reads_the_oracles_pages(ops, steps, reduce, budget, seed) -> None:
    cache = PagedCache(page_size=8, seed=seed)
    run_steps(cache, ops.store, steps)
    requests = [request for request, context in cache.requests.items() if context.keys]
    if not requests:
        return
    check_decode(ops, cache, requests, reduce, budget, group=3)


def check_decode(ops, cache: PagedCache, requests: list[int], reduce: str, budget: int, group: int) -> None:
    """Scores, pages and outputs of one decode step, each compared with the oracle."""
    size, dim, heads = cache.layout.block.page_size, cache.layout.block.head_size, cache.cache.shape[1]
    table, seq_lens, num_pages = cache.rows(requests)
    scale = dim**-0.5
    query = torch.from_numpy(cache.rng.standard_normal((len(requests), heads * group, dim))).float()
    scores = ops.score_pages(query, cache.pages.summary, table, num_pages, scale, reduce)
    pages = ops.select_pages(scores, num_pages, budget, 1, 2)
    out = ops.attend_pages(query, cache.pages.cache, table, seq_lens, pages, size, scale)
    for row, request in enumerate(requests):
        context = cache.requests[request]
        for head in range(heads):
            queries = query[row, head * group : (head + 1) * group].numpy()
            expected = oracle.reduced_scores(context, size, queries, head, scale, reduce)
            got = scores[row, head, : len(expected)].numpy()
            np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)
            # Selected from the same float32 scores: rounding must not decide between close pages.
            chosen = oracle.selected_pages(list(got), budget, 1, 2)
            assert [page for page in pages[row, head].tolist() if page >= 0] == chosen
            for q in range(group):
                tokens = oracle.tokens_of(context, chosen, size)
                expected_out = oracle.attention(context, tokens, queries[q], head, scale)
                np.testing.assert_allclose(
                    out[row, head * group + q].numpy(), expected_out, rtol=2e-5, atol=1e-5
                )


@pytest.mark.parametrize("threshold", [0.5, 2.0, 30.0])
@pytest.mark.parametrize("group", [1, 3])
def test_values_below_the_threshold_are_not_read(threshold, group) -> None:
    """Nor do they count; what is read for one query head of a group counts for all of them."""
    cache = PagedCache(page_size=8)
    requests = [cache.new_request() for _ in range(2)]
    cache.append(reference.store, dict(zip(requests, [140, 9], strict=True)))
    table, seq_lens, _ = cache.rows(requests)
    query = torch.from_numpy(cache.rng.standard_normal((2, 2 * group, 32))).float() * 3
    pages = torch.tensor([[0, 3, 5, 17], [0, 1, -1, -1]], dtype=torch.int32)[:, None].expand(-1, 2, -1)
    views = cache.pages
    arguments = (query, views.cache, table, seq_lens, pages, 8, 0.2)
    out = reference.attend_pages(*arguments, value_threshold=threshold)
    for row, request in enumerate(requests):
        context = cache.requests[request]
        tokens = oracle.tokens_of(context, [page for page in pages[row, 0].tolist() if page >= 0], 8)
        for head in range(2 * group):
            queries = query[row, head // group * group :][:group].numpy()
            near = oracle.near_tokens(context, tokens, queries, head // group, 0.2, threshold)
            assert (len(near) == len(tokens)) == (threshold == 30.0)
            expected = oracle.attention(context, near, query[row, head].numpy(), head // group, 0.2)
            np.testing.assert_allclose(out[row, head].numpy(), expected, rtol=2e-5, atol=1e-5)


def test_short_rows_read_every_page() -> None:
    """By their lengths, or because there is no list; what a list says of such a row does not matter."""
    cache = PagedCache(page_size=8)
    requests = [cache.new_request() for _ in range(2)]
    cache.append(reference.store, dict(zip(requests, [77, 21], strict=True)))
    table, seq_lens, _ = cache.rows(requests)
    query = torch.from_numpy(cache.rng.standard_normal((2, 6, 32))).float()
    lists = torch.tensor([[0, 9], [2**30, -1]], dtype=torch.int32)[:, None].expand(-1, 2, -1)
    views = cache.pages
    for pages, min_context, read in [
        (None, 0, [range(77), range(21)]),
        (lists, 22, [[*range(8), *range(72, 77)], range(21)]),
        (lists, 77, [[*range(8), *range(72, 77)], range(21)]),
        (lists, 78, [range(77), range(21)]),
    ]:
        arguments = (query, views.cache, table, seq_lens, pages, 8, 0.2)
        out = reference.attend_pages(*arguments, sparse_context=min_context)
        for row, tokens in enumerate(read):
            context = cache.requests[requests[row]]
            for head in range(6):
                expected = oracle.attention(context, list(tokens), query[row, head].numpy(), head // 3, 0.2)
                np.testing.assert_allclose(out[row, head].numpy(), expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
@pytest.mark.parametrize("length", [1, 17, 63, 577])
@pytest.mark.parametrize("page_size", [8, 16, 32])
def test_full_budget_is_dense_attention(ops, length, page_size) -> None:
    cache = PagedCache(page_size=page_size)
    request = cache.new_request()
    cache.append(ops.store, {request: length})
    table, seq_lens, num_pages = cache.rows([request])
    query = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(length))
    scores = ops.score_pages(query, cache.pages.summary, table, num_pages, 1.0, "max")
    pages = ops.select_pages(scores, num_pages, int(num_pages) + 2, 1, 1)
    assert pages[0, 0].tolist() == [*range(int(num_pages)), -1, -1]
    out = ops.attend_pages(query, cache.pages.cache, table, seq_lens, pages, page_size, 0.2)
    context = cache.requests[request]
    keys = torch.from_numpy(np.stack(context.keys, 1))  # [H, T, D]
    values = torch.from_numpy(np.stack(context.values, 1))
    expected = torch.nn.functional.scaled_dot_product_attention(query.view(2, 3, 32), keys, values, scale=0.2)
    torch.testing.assert_close(out.view(2, 3, 32), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
def test_nothing_is_evicted(ops) -> None:
    """A page skipped by one query is read by the next one that asks for it."""
    cache = PagedCache(num_kv_heads=1)
    request = cache.new_request()
    # The keys of page p point along channel p.
    key = torch.eye(32)[torch.arange(160) // 8][:, None].contiguous()
    cache.append(ops.store, {request: 160}, key=key)
    table, _, num_pages = cache.rows([request])
    for page in [5, 11, 5, 16, 11]:
        query = torch.eye(32)[page][None, None]
        scores = ops.score_pages(query, cache.pages.summary, table, num_pages, 1.0, "max")
        chosen = ops.select_pages(scores, num_pages, 4, 1, 2)
        assert chosen.flatten().tolist() == [0, page, 18, 19]


@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
@pytest.mark.parametrize("bounds_dtype", ["auto", "int8"])
def test_score_is_an_upper_bound(ops, bounds_dtype) -> None:
    cache = PagedCache(num_kv_heads=2, bounds_dtype=bounds_dtype)
    request = cache.new_request()
    cache.append(ops.store, {request: 203})
    table, _, num_pages = cache.rows([request])
    query = torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(7))
    scores = ops.score_pages(query, cache.pages.summary, table, num_pages, 1.0, "max")
    keys = np.stack(cache.requests[request].keys)
    for head in range(2):
        dots = keys[:, head] @ query[0, head].numpy()
        for page in range(int(num_pages)):
            assert scores[0, head, page] >= dots[page * 8 : page * 8 + 8].max() - 1e-4


@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
def test_pages_always_kept_win_against_infinite_scores(ops) -> None:
    scores = torch.full((1, 1, 12), torch.inf)
    scores[..., [0, 5, 11]] = -torch.inf
    pages = ops.select_pages(scores, torch.tensor([12], dtype=torch.int32), 4, 1, 2)
    assert pages.flatten().tolist() == [0, 1, 10, 11]


@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
def test_ties_go_to_the_earlier_page(ops) -> None:
    scores = torch.zeros(1, 1, 12)
    pages = ops.select_pages(scores, torch.tensor([12], dtype=torch.int32), 6, 1, 2)
    assert pages.flatten().tolist() == [0, 1, 2, 3, 10, 11]


@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
@pytest.mark.parametrize("formats", [{}, {"kv_dtype": "int4", "bounds_dtype": "int8"}], ids=["auto", "int4"])
@pytest.mark.parametrize("threshold", [0.5, 4.0, 12.0])
def test_value_threshold_leaves_out_what_weighs_nothing(ops, formats, threshold) -> None:
    """The output moves by no more than the share that is left out times the range of V."""
    cache = PagedCache(**formats)
    request = cache.new_request()
    cache.append(ops.store, {request: 203})
    table, seq_lens, _ = cache.rows([request])
    query = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(8))
    arguments = (query, cache.pages.cache, table, seq_lens, None, 8, 1.0)
    whole = ops.attend_pages(*arguments)
    out = ops.attend_pages(*arguments, value_threshold=threshold)
    values = np.stack(cache.requests[request].values)
    moved = (out - whole).abs().max()
    assert moved <= 203 * np.exp(-threshold) * 1.1 * np.ptp(values) + 1e-5
    assert threshold > 1 or moved > 1e-3  # something was left out
