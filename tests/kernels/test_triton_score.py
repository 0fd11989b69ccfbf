"""The Triton page scores against the reference: groups, reductions, dtypes, head sizes, splits, garbage."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.by_device import reference, triton
from tests.kernels.cache import PagedCache
from tests.kernels.interpreter import DEVICE, DTYPES, on_device
from vllm_quest.kernels.bounds import PageBounds
from vllm_quest.kernels.triton.workspace import Workspace
from vllm_quest.scorers.minmax.triton.score import score_scratch

# The interpreter computes masked lanes too, and numpy warns of what it finds there.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
LENGTHS = [577, 1, 17, 63]
# Scores are float32 sums of products of 16-bit numbers, in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-4}


def rows_of(lengths, heads=2, **kwargs):
    """A NaN-poisoned cache with requests of these lengths: their bounds, block table and page counts."""
    cache = PagedCache(num_blocks=90, num_kv_heads=heads, for_cpu=False, **kwargs)
    requests = [cache.new_request() for _ in lengths]
    cache.append(reference.store, dict(zip(requests, lengths, strict=True)))
    table, _, num_pages = cache.rows(requests)
    return cache, table, num_pages


def query_for(cache, rows, group):
    heads = cache.cache.shape[1] * group
    query = torch.from_numpy(cache.rng.standard_normal((rows, heads, cache.layout.block.head_size)))
    return query.to(cache.layout.block.dtype)


def assert_scores(*arguments, **tolerance) -> None:
    """As the reference's, where a row has pages; what lies beyond is not written."""
    expected = reference.score_pages(*arguments)
    actual = triton.score_pages(*on_device(*arguments)).cpu()
    actual = actual.where(expected.isfinite(), expected)
    torch.testing.assert_close(actual, expected, **(tolerance or CLOSE))


@pytest.mark.parametrize("group_reduce", ["max", "mean", "softmax_mean"])
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
def test_scores_are_the_references(dtype, block_size, page_size, head_size, group, group_reduce) -> None:
    cache, table, num_pages = rows_of(
        LENGTHS, block_size=block_size, page_size=page_size, head_size=head_size, dtype=dtype
    )
    assert_scores(query_for(cache, 4, group), cache.pages.summary, table, num_pages, 0.3, group_reduce)


@pytest.mark.parametrize("group_reduce", ["max", "softmax_mean"])
def test_one_long_row_is_split(group_reduce) -> None:
    cache, table, num_pages = rows_of(
        [2500, 9, 700, 17], block_size=64, page_size=8, head_size=16, dtype=DTYPES[0]
    )
    query = query_for(cache, 4, 3) * 4
    # 313 pages are five tiles: the long row has several splits of several tiles, the short ones one tile.
    assert_scores(query, cache.pages.summary, table, num_pages, 0.25, group_reduce)


@pytest.mark.parametrize("group_reduce", ["max", "mean", "softmax_mean"])
def test_persistent_buffers_serve_one_step_after_another(group_reduce) -> None:
    """A CUDA graph's buffers: too many rows, stale content, padding rows of length 0 with garbage tables."""
    cache, table, num_pages = rows_of([63, 17, 30], dtype=DTYPES[0], page_size=8, head_size=64)
    num_pages[1] = 0
    table[1] = 2**30
    query, heads, max_pages = query_for(cache, 3, 4), cache.cache.shape[1], table.shape[1] * 4
    workspace = Workspace.allocate(
        score_scratch(3 * heads, 4, max_pages, 64, group_reduce, DEVICE), 3 * heads, DEVICE
    )
    workspace.scratch.fill_(torch.nan)
    out = torch.full((3, heads, max_pages), 7.0, device=DEVICE)
    arguments = (query, cache.pages.summary, table, num_pages, 0.3, group_reduce)
    expected = reference.score_pages(*arguments).nan_to_num(7.0, neginf=7.0)
    for _ in range(2):
        assert triton.score_pages(*on_device(*arguments), out=out, workspace=workspace) is out
        torch.testing.assert_close(out.cpu(), expected, **CLOSE)
        assert not workspace.arrivals.any()


def test_huge_keys_do_not_overflow() -> None:
    cache, table, num_pages = rows_of([63], dtype=torch.float16, page_size=8, head_size=64)
    cache.pages.summary.values.mul_(10000)
    query = query_for(cache, 1, 4)
    assert_scores(query, cache.pages.summary, table, num_pages, 0.3, "max", rtol=1e-5, atol=1)


def test_what_the_kernel_relies_on_is_checked() -> None:
    cache, table, num_pages = rows_of([63], page_size=8)
    query = query_for(cache, 1, 4)
    bounds = cache.pages.summary
    moved = PageBounds(bounds.values.movedim(3, 2), None)
    for arguments, message in [
        ((query, bounds, table, num_pages, 1.0, "sum"), "group_reduce: 'sum'; allowed: max, mean"),
        ((query[:, :7], bounds, table, num_pages, 1.0, "max"), "7 heads for 2 KV heads"),
        ((query_for(cache, 1, 17), bounds, table, num_pages, 1.0, "max"), "groups of 1 to 16"),
        ((query, moved, table, num_pages, 1.0, "max"), r"bounds: .* is not \[B, H, P, 2, D\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            triton.score_pages(*arguments)
    workspace = Workspace.allocate(1, 1, DEVICE)
    with pytest.raises(ValueError, match="workspace: 1 elements and 1 counters"):
        triton.score_pages(query, bounds, table, num_pages, 1.0, "softmax_mean", workspace=workspace)
