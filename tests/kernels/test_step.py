"""Whole steps as the backend runs them, through `Operations`: store, score, select, attend."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests import oracle
from tests.kernels.cache import PagedCache
from tests.kernels.conformance import (
    EVERY_DEVICE,
    EVERY_SMALL,
    EXACT,
    HISTORIES,
    QUIET,
    REFERENCE_TOO,
    Case,
    any_history,
    new_cache,
    run_steps,
)
from tests.kernels.device import where
from vllm_quest.kernels.operations import Operations, Rows, Shapes

pytestmark = QUIET
GROUP = 3


def operations_of(cache: PagedCache, device: str, max_pages: int, **changes) -> Operations:
    heads = cache.cache.shape[1]
    shapes = Shapes(heads * GROUP, heads, 4, max_pages, False, where(device))
    return Operations(cache.layout, replace(cache.config, **changes), device, shapes)


def decode(case: Case, device: str, scale: float, **changes) -> tuple[torch.Tensor, ...]:
    """Scores, selected pages and outputs of one step."""
    cache, target = case.cache, where(device)
    pages_per_row = case.table.shape[1] * cache.layout.block.pages
    operations = operations_of(cache, device, pages_per_row, **changes)
    pages = cache.pages if target.type == "cpu" else cache.layout.views(cache.cache.to(target))
    rows = Rows(*(part.to(target) for part in (case.table, case.seq_lens, case.num_pages)))
    query = case.query.to(target)
    scores = operations.score_pages(query, pages, rows, scale)
    selected = operations.select_pages(scores, rows)
    out = torch.full_like(query, torch.nan)
    assert operations.attend_pages(query, pages, rows, selected, scale, out) is out
    return scores.cpu(), selected.cpu(), out.cpu()


def decode_case(cache: PagedCache) -> Case | None:
    requests = [request for request, context in cache.requests.items() if context.keys]
    return Case(cache, *cache.rows(requests), cache.random(len(requests), GROUP)) if requests else None


@pytest.mark.parametrize("reduce", ["max", "mean", "softmax_mean"])
def test_the_reference_reads_the_oracles_pages(reduce) -> None:
    def check(steps, seed) -> None:
        cache = new_cache("reference", EXACT, seed)
        run_steps(cache, steps)
        case, budget = decode_case(cache), 3 + seed % 7
        if case is None:
            return
        kernels, scale = cache.kernels, 32**-0.5
        scores = kernels.score_pages(case.query, case.table, case.num_pages, scale, reduce)
        pages = kernels.select_pages(scores, case.num_pages, budget, 1, 2)
        out = kernels.attend_pages(case.query, case.table, case.seq_lens, pages, scale)
        assert_decodes(case, reduce, budget, scale, scores, pages, out)

    any_history(15, check, drafts=False)


@EVERY_DEVICE
@pytest.mark.parametrize("reduce", ["max", "mean", "softmax_mean"])
def test_a_step_reads_the_oracles_pages(device, reduce) -> None:
    def check(steps, seed) -> None:
        cache = new_cache(device, EXACT, seed)
        run_steps(cache, steps)
        case, budget = decode_case(cache), 3 + seed % 7
        if case is None:
            return
        found = decode(case, device, 32**-0.5, group_reduce=reduce, token_budget=8 * budget)
        assert_decodes(case, reduce, budget, 32**-0.5, *found)

    any_history(HISTORIES[device] // 2, check, drafts=False)


def assert_decodes(
    case: Case,
    reduce: str,
    budget: int,
    scale: float,
    scores: torch.Tensor,
    pages: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Scores, pages and outputs of one decode step, each compared with the oracle."""
    close = {"rtol": 2e-5, "atol": 1e-5}
    if out.dtype != torch.float32:
        close = case.tolerance
    contexts = [context for context in case.cache.requests.values() if context.keys]
    for row, context in enumerate(contexts):
        for head in range(2):
            queries = case.query[row, head * GROUP :][:GROUP].float().numpy()
            expected = oracle.reduced_scores(context, 8, queries, head, scale, reduce)
            got = scores[row, head, : len(expected)].numpy()
            np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)
            # Selected from the same float32 scores: rounding must not decide between close pages.
            chosen = oracle.selected_pages(list(got), budget, 1, 2)
            assert [page for page in pages[row, head].tolist() if page >= 0] == chosen
            tokens = oracle.tokens_of(context, chosen, 8)
            for q in range(GROUP):
                expected_out = oracle.attention(context, tokens, queries[q], head, scale)
                actual = out[row, head * GROUP + q].float().numpy()
                np.testing.assert_allclose(actual, expected_out, **close)


@EVERY_DEVICE
@EVERY_SMALL
def test_a_step_is_the_references(device, entries) -> None:
    cache = new_cache(device, entries)
    requests = [cache.new_request() for _ in range(3)]
    cache.append(dict(zip(requests, [203, 9, 62], strict=True)), store=cache.reference.store)
    cache.append(dict.fromkeys(requests, 1), padding=1)
    case, size = decode_case(cache), cache.layout.block.page_size
    scores, pages, out = decode(case, device, case.scale, token_budget=4 * size)
    reference = cache.reference
    expected = reference.score_pages(case.query, case.table, case.num_pages, case.scale)
    in_context = expected.isfinite()
    torch.testing.assert_close(scores[in_context], expected[in_context], rtol=1e-5, atol=1e-4)
    assert torch.equal(pages, reference.select_pages(scores, case.num_pages, 4, 1, 2))
    expected = reference.attend_pages(case.query, case.table, case.seq_lens, pages, case.scale)
    torch.testing.assert_close(out, expected, **case.tolerance)


@EVERY_DEVICE
@EVERY_SMALL
@pytest.mark.parametrize("length", [1, 17, 63, 577])
def test_a_budget_that_covers_every_page_is_dense_attention(device, entries, length) -> None:
    """Whether the budget is larger than the context, or there is none."""
    cache = new_cache(device, entries)
    cache.append({cache.new_request(): length}, store=cache.reference.store)
    case = decode_case(cache)
    dense = cache.reference.attend_pages(case.query, case.table, case.seq_lens, None, case.scale)
    _, pages, out = decode(case, device, case.scale, token_budget=640)
    total = int(case.num_pages)
    assert pages[0, 0, : total + 1].tolist() == [*range(total), -1]
    torch.testing.assert_close(out, dense, **case.tolerance)
    operations = operations_of(cache, device, case.table.shape[1] * cache.layout.block.pages)
    assert operations.references == []


@pytest.mark.parametrize("page_size", [8, 16, 32])
@pytest.mark.parametrize("length", [1, 17, 63, 577])
def test_the_reference_with_a_full_budget_is_dense_attention(page_size, length) -> None:
    cache = new_cache("reference", EXACT | {"page_size": page_size})
    cache.append({cache.new_request(): length})
    case = decode_case(cache)
    pages = case.selected(int(case.num_pages) + 2)
    assert pages[0, 0].tolist() == [*range(int(case.num_pages)), -1, -1]
    out = cache.kernels.attend_pages(case.query, case.table, case.seq_lens, pages, 0.2)
    keys, values = (
        torch.from_numpy(np.stack(tokens, 1)) for tokens in (cache.requests[0].keys, cache.requests[0].values)
    )
    query = case.query.view(2, GROUP, 32)
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, scale=0.2)
    torch.testing.assert_close(out.view(2, GROUP, 32), expected, rtol=1e-5, atol=1e-5)


@REFERENCE_TOO
@EVERY_SMALL
def test_nothing_is_evicted(device, entries) -> None:
    """A page skipped by one query is read by the next one that asks for it."""
    cache = new_cache(device, entries | {"num_kv_heads": 1})
    size, dim = cache.layout.block.page_size, cache.layout.block.head_size
    request, tokens = cache.new_request(), 20 * size
    # The keys of page p point along channel p.
    key = torch.eye(dim)[torch.arange(tokens) // size][:, None].to(cache.layout.block.dtype)
    cache.append({request: tokens}, key=key)
    table, _, num_pages = cache.rows([request])
    for page in [5, 11, 5, 16, 11]:
        query = torch.eye(dim)[page][None, None].to(key.dtype)
        scores = cache.kernels.score_pages(query, table, num_pages, 1.0)
        chosen = cache.kernels.select_pages(scores, num_pages, 4, 1, 2)
        assert chosen.flatten().tolist() == [0, page, 18, 19]
