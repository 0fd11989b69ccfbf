"""Attention: the reference's over any pages; the oracle's over the tokens that are read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import oracle
from tests.kernels.conformance import (
    EVERY_DEVICE,
    EVERY_LINE,
    EVERY_SMALL,
    EXACT,
    LENGTHS,
    LINES,
    QUIET,
    REFERENCE_TOO,
    SMALL,
    Case,
    case_of,
    name_of,
    new_cache,
)

pytestmark = QUIET
DENSE_LINES = pytest.mark.parametrize(
    "line", [line for line in LINES if "kv_dtype" not in line.entries], ids=str
)


def random_pages(num_pages: torch.Tensor, heads: int, budget: int, seed: int = 0) -> torch.Tensor:
    """``[R, H, budget]`` as `select_pages` returns them: ascending, the row's last one too, then -1."""
    generator = torch.Generator().manual_seed(seed)
    pages = torch.full((len(num_pages), heads, budget), -1, dtype=torch.int32)
    for row, total in enumerate(num_pages.tolist()):
        for head in range(heads):
            chosen = torch.randperm(max(total - 1, 0), generator=generator)[: budget - 1].sort().values
            pages[row, head, : len(chosen)] = chosen
            if total:
                pages[row, head, len(chosen)] = total - 1
    return pages


def assert_attends(
    case: Case, pages: torch.Tensor | None, scale: float | None = None, **options
) -> torch.Tensor:
    arguments = (case.query, case.table, case.seq_lens, pages, scale or case.scale)
    actual = case.cache.kernels.attend_pages(*arguments, **options)
    expected = case.cache.reference.attend_pages(*arguments, **options)
    torch.testing.assert_close(actual, expected, **case.tolerance)
    assert actual.isfinite().all()
    return actual


@EVERY_DEVICE
@EVERY_LINE
def test_attention_is_the_references(device, line) -> None:
    """Over selected pages and others, few or all; over all pages where a row is short or there is no list."""
    case = case_of(line, device)
    assert_attends(case, case.selected(7))
    for budget in (1, 80):
        assert_attends(case, random_pages(case.num_pages, line.kv_heads, budget))
    assert_attends(case, case.selected(3), sparse_context=100)
    assert_attends(case, None)


@EVERY_DEVICE
@DENSE_LINES
def test_a_full_budget_is_dense_attention(device, line) -> None:
    case = case_of(line, device)
    heads, block = line.kv_heads, case.cache.layout.block
    pages = random_pages(case.num_pages, heads, int(case.num_pages.max()))
    out = case.cache.kernels.attend_pages(case.query, case.table, case.seq_lens, pages, case.scale)
    for row, context in enumerate(case.cache.requests.values()):
        keys, values = (
            torch.from_numpy(np.stack(tokens, 1)).double() for tokens in (context.keys, context.values)
        )
        queries = case.query[row].double().view(heads, -1, block.head_size)
        dense = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, scale=case.scale)
        bound = case.tolerance["rtol"]
        atol = 2e-6 if device == "cpu" else bound
        torch.testing.assert_close(out[row], dense.flatten(0, 1).to(out.dtype), rtol=bound, atol=atol)


@EVERY_DEVICE
@EVERY_LINE
def test_rows_are_independent(device, line) -> None:
    """One row alone is cut into chunks or splits, many rows are not: the parts add up to the same."""
    case = case_of(line, device, [200, 63])
    pages = case.selected(30)
    rows = (case.query, case.table, case.seq_lens, pages)
    both = case.cache.kernels.attend_pages(*rows, case.scale)
    for row in range(2):
        alone = case.cache.kernels.attend_pages(*(part[row : row + 1] for part in rows), case.scale)
        torch.testing.assert_close(alone, both[row : row + 1], **case.tolerance)


@EVERY_DEVICE
@pytest.mark.parametrize("entries", [EXACT, SMALL[-1]], ids=name_of)
@pytest.mark.parametrize("sparse_context", [18, 64, 577, 578])
def test_short_rows_read_every_page(device, entries, sparse_context) -> None:
    """Also those that the budget does not cover; their lists are garbage."""
    case = small_case(device, entries, LENGTHS)
    pages = random_pages(case.num_pages, 2, 3)
    pages[case.seq_lens < sparse_context] = 2**30
    assert_attends(case, pages, sparse_context=sparse_context)


def small_case(device: str, entries: dict, lengths: list[int], group: int = 3) -> Case:
    cache = new_cache(device, entries | {"num_blocks": 40})
    requests = [cache.new_request() for _ in lengths]
    cache.append(dict(zip(requests, lengths, strict=True)), store=cache.reference.store)
    return Case(cache, *cache.rows(requests), cache.random(len(lengths), group))


def test_what_the_reference_reads_is_the_oracles() -> None:
    """All of a short row, by its length, or because there is no list; its list does not matter then."""
    case = small_case("reference", EXACT, [77, 21])
    lists = torch.tensor([[0, 9], [2**30, -1]], dtype=torch.int32)[:, None].expand(-1, 2, -1)
    for pages, sparse_context, read in [
        (None, 0, [range(77), range(21)]),
        (lists, 22, [[*range(8), *range(72, 77)], range(21)]),
        (lists, 77, [[*range(8), *range(72, 77)], range(21)]),
        (lists, 78, [range(77), range(21)]),
    ]:
        out = case.cache.kernels.attend_pages(
            case.query, case.table, case.seq_lens, pages, 0.2, sparse_context=sparse_context
        )
        for (row, tokens), context in zip(enumerate(read), case.cache.requests.values(), strict=True):
            for head in range(6):
                query = case.query[row, head].numpy()
                expected = oracle.attention(context, list(tokens), query, head // 3, 0.2)
                np.testing.assert_allclose(out[row, head].numpy(), expected, rtol=2e-5, atol=1e-5)


@EVERY_DEVICE
@EVERY_SMALL
def test_rows_without_a_context_are_zero(device, entries) -> None:
    """Padding rows of a CUDA graph: garbage in the block table, stale `out`."""
    case = small_case(device, entries, [63, 17])
    seq_lens, table = torch.tensor([0, 17], dtype=torch.int32), case.table.clone()
    table[0] = 2**30
    pages = random_pages(case.num_pages, 2, 6)
    pages[0] = -1
    kernels = case.cache.kernels
    one = case._replace(query=case.query[1:], table=table[1:], seq_lens=seq_lens[1:])
    for lists, listed in ((pages, pages[1:]), (None, None)):
        out = torch.full_like(case.query, torch.nan, device=kernels.where)
        actual = kernels.attend_pages(case.query, table, seq_lens, lists, case.scale, out=out)
        assert not actual[0].any()
        torch.testing.assert_close(actual[1:], assert_attends(one, listed), **case.tolerance)


@EVERY_DEVICE
@pytest.mark.parametrize("factor", [1e-4, 300.0])
def test_flat_and_peaked_softmax(device, factor) -> None:
    """All weights alike, or one weight only, in whichever split it is; logits of thousands."""
    case = case_of(LINES[1], device, [577, 63])
    case = case._replace(query=case.query * factor)
    assert_attends(case, random_pages(case.num_pages, 3, 40), scale=1.0)


@pytest.mark.parametrize("threshold", [0.5, 2.0, 30.0])
@pytest.mark.parametrize("group", [1, 3])
def test_values_below_the_threshold_are_not_read(threshold, group) -> None:
    """Nor do they count; what is read for one query head of a group counts for all of them."""
    case = small_case("reference", EXACT, [140, 9], group)
    pages = torch.tensor([[0, 3, 5, 17], [0, 1, -1, -1]], dtype=torch.int32)[:, None].expand(-1, 2, -1)
    query = case.query * 3
    out = case.cache.kernels.attend_pages(
        query, case.table, case.seq_lens, pages, 0.2, value_threshold=threshold
    )
    for row, context in enumerate(case.cache.requests.values()):
        tokens = oracle.tokens_of(context, [page for page in pages[row, 0].tolist() if page >= 0], 8)
        for head in range(2 * group):
            queries = query[row, head // group * group :][:group].numpy()
            near = oracle.near_tokens(context, tokens, queries, head // group, 0.2, threshold)
            assert (len(near) == len(tokens)) == (threshold == 30.0)
            expected = oracle.attention(context, near, query[row, head].numpy(), head // group, 0.2)
            np.testing.assert_allclose(out[row, head].numpy(), expected, rtol=2e-5, atol=1e-5)


@REFERENCE_TOO
@EVERY_SMALL
@pytest.mark.parametrize("threshold", [0.5, 4.0, 12.0, 40.0])
def test_a_threshold_leaves_out_what_weighs_nothing(device, entries, threshold) -> None:
    """The output moves by no more than the share that is left out times the range of V."""
    case = small_case(device, entries, [203])
    arguments = (case.query, case.table, case.seq_lens, None, 1.0)
    whole = case.cache.kernels.attend_pages(*arguments).float()
    out = case.cache.kernels.attend_pages(*arguments, value_threshold=threshold).float()
    moved = (out - whole).abs().max()
    rounding = 1e-5 if case.query.dtype == torch.float32 else 2 * case.tolerance["atol"]
    assert moved <= 203 * np.exp(-threshold) * 1.1 * np.ptp(case.cache.requests[0].values) + rounding
    assert threshold > 1 or moved > 1e-3  # something was left out


@EVERY_DEVICE
@pytest.mark.parametrize("line", [LINES[1], LINES[3], LINES[4]], ids=str)
@pytest.mark.parametrize("threshold", [0.1, 1.0, 4.0, 40.0])
def test_a_threshold_costs_no_more_than_what_it_drops(device, line, threshold) -> None:
    """A running maximum keeps what the final one keeps: the softmax that is lost bounds the error."""
    case = case_of(line, device, [77, 17])
    group, size = line.group, line.page_size
    pages = random_pages(case.num_pages, line.kv_heads, 30)
    arguments = (case.query, case.table, case.seq_lens, pages, 0.2)
    out = case.cache.kernels.attend_pages(*arguments, value_threshold=threshold)
    error = (out - case.cache.reference.attend_pages(*arguments)).float().abs()
    for row, context in enumerate(case.cache.requests.values()):
        for head in range(line.kv_heads * group):
            kv_head = head // group
            tokens = oracle.tokens_of(context, [p for p in pages[row, kv_head].tolist() if p >= 0], size)
            queries = case.query[row, kv_head * group :][:group].float().numpy()
            near = oracle.near_tokens(context, tokens, queries, kv_head, 0.2, threshold)
            logits = oracle.logits_of(context, tokens, queries[head % group], kv_head, 0.2)
            weights = np.exp(logits - logits.max())
            lost = [weight for weight, token in zip(weights, tokens, strict=True) if token not in near]
            values = np.stack([context.values[token][kv_head] for token in tokens])
            rounding = case.tolerance["rtol"] * np.abs(values).max(0)
            bound = sum(lost) / weights.sum() * np.ptp(values, axis=0) + rounding
            assert (error[row, head].numpy() <= bound).all()
