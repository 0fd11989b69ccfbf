"""The Triton attention over selected pages against the reference; at full budget against dense attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import oracle
from tests.kernels.by_device import reference, triton
from tests.kernels.cache import PagedCache
from tests.kernels.interpreter import DEVICE, DTYPES, TOLERANCE, on_device
from tests.kernels.test_triton_score import LENGTHS, query_for, rows_of
from vllm_quest.config import QuestConfig
from vllm_quest.kernels.triton.workspace import Workspace, attend_scratch
from vllm_quest.page import PageLayout


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


def attend(cache, query, table, seq_lens, pages, scale, **kwargs):
    size, views = cache.layout.block.page_size, cache.layout.views(cache.cache.to(DEVICE))
    table, seq_lens, pages = on_device(table, seq_lens, pages)
    return triton.attend_pages(query.to(DEVICE), views.cache, table, seq_lens, pages, size, scale, **kwargs)


def expected_of(cache, query, table, seq_lens, pages, scale, **kwargs):
    views, size = cache.pages, cache.layout.block.page_size
    return reference.attend_pages(query, views.cache, table, seq_lens, pages, size, scale, **kwargs)


def assert_attends(cache, *arguments, **kwargs) -> None:
    bound = TOLERANCE[cache.layout.block.dtype]
    actual, expected = attend(cache, *arguments, **kwargs).cpu(), expected_of(cache, *arguments, **kwargs)
    torch.testing.assert_close(actual, expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("budget", [1, 5, 80])
@pytest.mark.parametrize(
    ("dtype", "block_size", "page_size", "head_size", "group"),
    [
        (DTYPES[-1], 16, 8, 64, 1),
        (DTYPES[0], 32, 8, 96, 3),
        (DTYPES[1], 64, 16, 128, 4),
        (DTYPES[0], 32, 32, 256, 8),
        (DTYPES[0], 16, 16, 128, 16),
        (DTYPES[1], 128, 64, 80, 4),
    ],
)
def test_attention_is_the_references(dtype, block_size, page_size, head_size, group, budget) -> None:
    cache, table, num_pages = rows_of(
        LENGTHS, block_size=block_size, page_size=page_size, head_size=head_size, dtype=dtype
    )
    seq_lens = torch.tensor(LENGTHS, dtype=torch.int32)
    query, pages = query_for(cache, 4, group), random_pages(num_pages, 2, budget)
    assert_attends(cache, query, table, seq_lens, pages, head_size**-0.5)


def test_a_full_budget_is_dense_attention() -> None:
    cache, table, num_pages = rows_of([577], dtype=DTYPES[0], page_size=8, head_size=64)
    context = cache.requests[0]
    key, value = (torch.tensor([t.tolist() for t in tokens]) for tokens in (context.keys, context.values))
    query = query_for(cache, 1, 4)
    dense = torch.nn.functional.scaled_dot_product_attention(
        query.float().view(2, 4, 64), key.transpose(0, 1), value.transpose(0, 1)
    )
    pages = random_pages(num_pages, 2, 73)
    actual = attend(cache, query, table, torch.tensor([577], dtype=torch.int32), pages, 0.125)
    bound = TOLERANCE[DTYPES[0]]
    torch.testing.assert_close(actual.cpu().float().view(2, 4, 64), dense, rtol=bound, atol=bound)


def test_thousands_of_pages() -> None:
    cache, table, num_pages = rows_of(
        [16400], heads=1, block_size=256, page_size=8, head_size=16, dtype=DTYPES[-1]
    )
    seq_lens = torch.tensor([16400], dtype=torch.int32)
    query = query_for(cache, 1, 2)
    assert_attends(cache, query, table, seq_lens, random_pages(num_pages, 1, 2050), 0.25)
    assert_attends(cache, query, table, seq_lens, random_pages(num_pages, 1, 2000), 0.25)


@pytest.mark.parametrize("min_context", [18, 64, 577, 578])
@pytest.mark.parametrize(("page_size", "head_size", "group"), [(8, 64, 4), (16, 96, 1)])
def test_short_rows_read_every_page(page_size, head_size, group, min_context) -> None:
    """Also those that the budget does not cover; their lists are garbage."""
    cache, table, num_pages = rows_of(LENGTHS, page_size=page_size, head_size=head_size, dtype=DTYPES[0])
    seq_lens, pages = torch.tensor(LENGTHS, dtype=torch.int32), random_pages(num_pages, 2, 3)
    pages[seq_lens < min_context] = 2**30
    query = query_for(cache, 4, group)
    assert_attends(cache, query, table, seq_lens, pages, 0.125, sparse_context=min_context)


def test_without_lists_every_row_reads_every_page() -> None:
    cache, table, _ = rows_of(LENGTHS, page_size=16, head_size=128, dtype=DTYPES[1])
    query = query_for(cache, 4, 4)
    assert_attends(cache, query, table, torch.tensor(LENGTHS, dtype=torch.int32), None, 0.088)


def test_values_below_the_threshold_are_not_loaded() -> None:
    """Every tile of tokens begins with each head's top: what is to be read does not depend on the splits."""
    group, size, near, far = 3, 577, -5.0, -15.0
    cache = PagedCache(
        num_kv_heads=1, block_size=32, page_size=8, head_size=64, dtype=DTYPES[0], for_cpu=False
    )
    generator = torch.Generator().manual_seed(3)
    logits = torch.tensor([0.0, near, far, far, far, far])[
        torch.randint(6, (size, group), generator=generator)
    ]
    logits[::64] = 0.0
    key = torch.zeros(size, 1, 64)
    key[:, 0, :group] = logits
    request = cache.new_request()
    cache.append(reference.store, {request: size}, key=key.to(DTYPES[0]))
    unread = (logits == far).all(1).nonzero().flatten()
    assert 100 < len(unread) < 400
    table, seq_lens, num_pages = cache.rows([request])
    cache.pages.cache.value[table[0].long()[unread // 32], :, unread % 32] = torch.nan
    query = torch.eye(64)[None, :group].to(DTYPES[0])
    pages = random_pages(num_pages, 1, int(num_pages))
    assert_attends(cache, query, table, seq_lens, pages, 1.0, value_threshold=10.0)
    assert attend(cache, query, table, seq_lens, pages, 1.0).isnan().any()
    assert attend(cache, query, table, seq_lens, pages, 1.0, value_threshold=16.0).isnan().any()


@pytest.mark.parametrize("threshold", [0.1, 1.0, 4.0, 40.0])
@pytest.mark.parametrize(("head_size", "group"), [(64, 4), (96, 1), (128, 16)])
def test_a_threshold_costs_no_more_than_what_it_drops(head_size, group, threshold) -> None:
    """A running maximum keeps what the final one keeps: the softmax that is lost bounds the error."""
    cache, table, num_pages = rows_of(LENGTHS, page_size=8, head_size=head_size, dtype=DTYPES[0])
    seq_lens, pages = torch.tensor(LENGTHS, dtype=torch.int32), random_pages(num_pages, 2, 30)
    query = query_for(cache, 4, group)
    arguments = (cache, query, table, seq_lens, pages, 0.2)
    error = (attend(*arguments, value_threshold=threshold).cpu() - expected_of(*arguments)).float().abs()
    for row, context in enumerate(cache.requests.values()):
        for head in range(2 * group):
            kv_head = head // group
            tokens = oracle.tokens_of(context, [p for p in pages[row, kv_head].tolist() if p >= 0], 8)
            queries = query[row, kv_head * group :][:group].float().numpy()
            near = oracle.near_tokens(context, tokens, queries, kv_head, 0.2, threshold)
            logits = oracle.logits_of(context, tokens, queries[head % group], kv_head, 0.2)
            weights = np.exp(logits - logits.max())
            lost = (
                sum(w for w, token in zip(weights, tokens, strict=True) if token not in near) / weights.sum()
            )
            values = np.stack([context.values[token][kv_head] for token in tokens])
            bound = lost * np.ptp(values, axis=0) + TOLERANCE[DTYPES[0]] * np.abs(values).max(0)
            assert (error[row, head].numpy() <= bound).all()


def test_rows_without_pages_are_zero() -> None:
    """Padding rows of a CUDA graph: no context, garbage in the block table, stale `out`."""
    cache, table, num_pages = rows_of([63, 17], dtype=DTYPES[0], page_size=8, head_size=64)
    seq_lens = torch.tensor([0, 17], dtype=torch.int32)
    table[0] = 2**30
    pages = random_pages(num_pages, 2, 6)
    pages[0] = -1
    query = query_for(cache, 2, 4)
    out = torch.full_like(query, torch.nan, device=DEVICE)
    actual = attend(cache, query, table, seq_lens, pages, 0.125, out=out).cpu()
    assert not actual[0].any()
    one = slice(1, 2)
    expected = expected_of(cache, query[one], table[one], seq_lens[one], pages[one], 0.125)
    torch.testing.assert_close(actual[one], expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("factor", [1e-4, 300.0])
def test_flat_and_peaked_softmax(factor) -> None:
    """All weights alike, or one weight only, in whichever split it is; logits of thousands."""
    cache, table, num_pages = rows_of([577, 63], dtype=DTYPES[0], page_size=8, head_size=64)
    seq_lens = torch.tensor([577, 63], dtype=torch.int32)
    query = query_for(cache, 2, 4) * factor
    assert_attends(cache, query, table, seq_lens, random_pages(num_pages, 2, 40), 1.0)


def test_persistent_buffers_serve_one_step_after_another() -> None:
    cache, table, _ = rows_of([577, 63, 300], dtype=DTYPES[0], page_size=8, head_size=64)
    elements = attend_scratch(6, 4, 64, 40 * 8, DEVICE)
    workspace = Workspace.allocate(elements, 6, DEVICE)
    workspace.scratch.fill_(torch.nan)
    out = torch.full((3, 8, 64), torch.nan, dtype=DTYPES[0], device=DEVICE)
    bound = TOLERANCE[DTYPES[0]]
    for seed, lengths in enumerate([[577, 63, 300], [9, 63, 0], [400, 1, 299]]):
        seq_lens = torch.tensor(lengths, dtype=torch.int32)
        pages = random_pages((seq_lens + 7) // 8, 2, 40, seed)
        arguments = (query_for(cache, 3, 4), table, seq_lens, pages, 0.125)
        assert attend(cache, *arguments, out=out, workspace=workspace) is out
        expected = expected_of(cache, *arguments).nan_to_num(0)  # rows without pages
        torch.testing.assert_close(out.cpu(), expected, rtol=bound, atol=bound)
        assert not workspace.arrivals.any()


def test_strides_of_blocks_heads_and_queries_are_free() -> None:
    layout = PageLayout.configured(QuestConfig(bounds_dtype="auto"), 16, 32, DTYPES[0], for_cpu=False)
    cache = torch.randn(3, 5, 16, layout.content_size).to(DTYPES[0])  # heads before blocks
    views = layout.views(cache.transpose(0, 1))
    on_gpu = layout.views(cache.to(DEVICE).transpose(0, 1))
    query = torch.randn(2, 3, 6, 32).to(DTYPES[0])[:, 0]  # a slice of one projection
    table = torch.tensor([[4, 1], [0, 2]], dtype=torch.int32)
    seq_lens = torch.tensor([20, 32], dtype=torch.int32)
    pages = random_pages(torch.tensor([3, 4]), 3, 2)
    actual = triton.attend_pages(query.to(DEVICE), on_gpu.cache, *on_device(table, seq_lens, pages), 8, 0.2)
    expected = reference.attend_pages(query, views.cache, table, seq_lens, pages, 8, 0.2)
    torch.testing.assert_close(actual.cpu(), expected, rtol=2**-7, atol=2**-7)


def test_what_the_kernel_relies_on_is_checked() -> None:
    cache, table, num_pages = rows_of([63], page_size=8)
    query, pages = query_for(cache, 1, 2), random_pages(num_pages, 2, 4)
    whole = cache.pages.cache
    apart = whole._replace(value=whole.value.contiguous())
    seq_lens = torch.tensor([63], dtype=torch.int32)
    for arguments, message in [
        ((query, whole, table, seq_lens, pages, 12), "page_size: 12; allowed: a power of two"),
        ((query, apart, table, seq_lens, pages, 8), "key_cache, value_cache: strides"),
        ((query[:, :3], whole, table, seq_lens, pages, 8), "3 heads for 2 KV heads"),
        (
            (query, whole, table, seq_lens, pages.mT.contiguous().mT, 8),
            "page_indices: the last dimension",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            triton.attend_pages(*arguments, 1.0)
