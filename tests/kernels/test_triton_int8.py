"""The Triton operations on 8-bit bounds against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests.kernels.by_device import reference, triton
from tests.kernels.cache import PagedCache
from tests.kernels.interpreter import DEVICE, DTYPES, on_device
from tests.kernels.test_operations import STEPS, run_steps
from tests.kernels.test_triton_score import LENGTHS, assert_scores, query_for, rows_of
from vllm_quest.kernels.bounds import read_bounds

# The interpreter computes masked lanes too, and numpy warns of what it finds there.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


def new_cache(**kwargs) -> PagedCache:
    return PagedCache(for_cpu=False, bounds_dtype="int8", **kwargs)


def store_into(cache: PagedCache):
    """`triton.store` for `cache`, compared with the reference: to the bit, where no GPU fuses operations."""

    def store(key, value, pages, slot_mapping) -> None:
        expected, written = cache.cache.clone(), cache.cache.to(DEVICE)
        views = cache.layout.views(expected)
        reference.store(key, value, views, slot_mapping)
        views = cache.layout.views(written)
        triton.store(*on_device(key, value), views, slot_mapping.to(DEVICE))
        cache.cache.copy_(written)
        different = cache.cache.view(torch.uint8) != expected.view(torch.uint8)
        if DEVICE.type == "cpu":
            assert not different.any()
        else:  # codes at a tie
            assert different.float().mean() < 1e-3

    return store


@pytest.mark.parametrize(
    ("dtype", "block_size", "page_size", "head_size"),
    [(DTYPES[-1], 16, 16, 64), (DTYPES[0], 32, 8, 96), (DTYPES[1], 128, 32, 128), (DTYPES[0], 64, 64, 256)],
)
def test_chunked_prefill_then_decode(dtype, block_size, page_size, head_size) -> None:
    cache = new_cache(
        num_blocks=60, block_size=block_size, page_size=page_size, head_size=head_size, dtype=dtype
    )
    store = store_into(cache)
    first, second, third = (cache.new_request() for _ in range(3))
    cache.append(store, {first: 577, second: 17}, padding=3)  # a program per page or block
    cache.append(store, {first: 1, second: 63, third: 5})  # a program per token; chunks begin inside a page
    for _ in range(3):
        cache.append(store, {first: 1, second: 1, third: 1}, padding=2)
    cache.append(store, {third: 1}, key=torch.full((1, 2, head_size), 50.0, dtype=dtype))  # the range grows


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(steps=STEPS)
def test_any_schedule(steps) -> None:
    cache = new_cache(num_kv_heads=1, page_size=8, head_size=16)
    run_steps(cache, store_into(cache), steps)


@pytest.mark.parametrize("key", ["constant", "zeros", "outlier", "infinite"])
def test_extreme_keys(key) -> None:
    cache = new_cache(block_size=16, page_size=8, dtype=DTYPES[0])
    keys = torch.ones(11, 2, 32) if key == "constant" else torch.randn(11, 2, 32)
    if key == "zeros":
        keys = torch.zeros(11, 2, 32)
        keys[::2] = -0.0
    if key in ("outlier", "infinite"):
        keys[4, :, 3] = 3e38 if key == "outlier" else torch.inf
        keys[9, :, 5] = -3e38 if key == "outlier" else -torch.inf
    request = cache.new_request()
    store = store_into(cache)
    cache.append(store, {request: 5}, key=keys[:5].to(DTYPES[0]))
    cache.append(store, {request: 6}, key=keys[5:].to(DTYPES[0]))
    blocks = torch.tensor(cache.requests[request].blocks)
    bounds = read_bounds(cache.pages.summary, blocks)[:, :, 0]
    assert not bounds.isnan().any()
    assert bounds.isfinite().all() or key == "infinite"  # whose bound may be infinite, too


@pytest.mark.parametrize(
    ("dtype", "block_size", "page_size", "head_size", "group"),
    [(DTYPES[-1], 16, 8, 64, 1), (DTYPES[0], 64, 16, 96, 3), (DTYPES[1], 128, 32, 128, 16)],
)
def test_scores_are_the_references(dtype, block_size, page_size, head_size, group) -> None:
    cache, table, num_pages = rows_of(
        LENGTHS,
        block_size=block_size,
        page_size=page_size,
        head_size=head_size,
        dtype=dtype,
        bounds_dtype="int8",
    )
    query = query_for(cache, len(LENGTHS), group)
    for group_reduce in ("max", "softmax_mean"):
        assert_scores(query, cache.pages.summary, table, num_pages, 0.3, group_reduce)
