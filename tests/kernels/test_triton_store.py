"""The Triton store against the reference, to the bit: chunks, reused blocks, padding, rejected drafts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests.kernels.by_device import reference, triton
from tests.kernels.cache import PagedCache
from tests.kernels.interpreter import DEVICE, DTYPES, on_device
from tests.kernels.test_operations import STEPS, assert_bounds, run_steps
from vllm_quest.config import QuestConfig
from vllm_quest.page import PageLayout


def store_into(cache: PagedCache):
    """`triton.store` for `cache`, whose memory is on the CPU; the reference must agree to the bit."""

    def store(key, value, pages, slot_mapping) -> None:
        expected, written = cache.cache.clone(), cache.cache.to(DEVICE)
        reference.store(key, value, cache.layout.views(expected), slot_mapping)
        triton.store(*on_device(key, value), cache.layout.views(written), slot_mapping.to(DEVICE))
        cache.cache.copy_(written)
        torch.testing.assert_close(cache.cache, expected, rtol=0, atol=0, equal_nan=True)

    return store


def new_cache(**kwargs) -> PagedCache:
    return PagedCache(for_cpu=False, **kwargs)


@pytest.mark.parametrize(
    ("dtype", "block_size", "page_size", "head_size"),
    [(DTYPES[-1], 16, 16, 64), (DTYPES[0], 32, 8, 96), (DTYPES[1], 64, 32, 128), (DTYPES[0], 64, 64, 256)],
)
def test_chunked_prefill_then_decode(dtype, block_size, page_size, head_size) -> None:
    cache = new_cache(
        num_blocks=60, block_size=block_size, page_size=page_size, head_size=head_size, dtype=dtype
    )
    first, second, third = (cache.new_request() for _ in range(3))
    cache.append(store_into(cache), {first: 577, second: 17}, padding=3)  # a program per page
    cache.append(store_into(cache), {first: 1, second: 63, third: 5})  # a program per token
    cache.append(store_into(cache), {first: 1, second: 1, third: 1}, padding=2)
    assert_bounds(cache)


def test_reused_block_forgets_its_owner() -> None:
    cache = new_cache(num_blocks=2, block_size=16, page_size=8)
    old = cache.new_request()
    cache.append(store_into(cache), {old: 32})
    cache.cache[:] *= 1000
    cache.finish(old)
    new = cache.new_request()
    cache.append(store_into(cache), {new: 3})
    cache.append(store_into(cache), {new: 6})
    assert_bounds(cache)


def test_rejected_draft_leaves_no_trace() -> None:
    cache = new_cache(block_size=16, page_size=16)
    request = cache.new_request()
    cache.append(store_into(cache), {request: 5})
    cache.append(store_into(cache), {request: 4}, key=torch.full((4, 2, 32), 1000.0))
    context = cache.requests[request]
    del context.keys[6:], context.values[6:]  # the first draft token was accepted
    cache.append(store_into(cache), {request: 2})
    assert_bounds(cache)
    assert cache.pages.summary.values[context.blocks[0], :, 0, 1].amax() == 1000


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(steps=STEPS)
def test_any_schedule(steps) -> None:
    cache = new_cache(num_kv_heads=1, page_size=8, head_size=16)
    run_steps(cache, store_into(cache), steps)
    assert_bounds(cache)


def test_strides_of_blocks_and_heads_are_free() -> None:
    layout = PageLayout.configured(QuestConfig(bounds_dtype="auto"), 16, 32, DTYPES[0], for_cpu=False)
    shape = (3, 5, 16, layout.content_size)  # heads before blocks
    cache = torch.full(shape, torch.nan, device=DEVICE, dtype=DTYPES[0])
    views = layout.views(cache.transpose(0, 1))
    qkv = torch.randn(9, 3, 5, 32, device=DEVICE).to(DTYPES[0])  # keys and values as slices of one projection
    key, value = qkv[:, 1, :3], qkv[:, 2, :3]
    slots = torch.arange(21, 30, device=DEVICE)
    triton.store(key, value, views, slots)
    torch.testing.assert_close(views.cache.key[1, :, 5:14], key.transpose(0, 1), rtol=0, atol=0)
    torch.testing.assert_close(views.cache.value[1, :, 5:14], value.transpose(0, 1), rtol=0, atol=0)
    torch.testing.assert_close(views.summary.values[1, :, 1, 1], key[3:].amax(0), rtol=0, atol=0)


def test_no_tokens_and_only_padding_write_nothing() -> None:
    cache = new_cache()
    cache.append(store_into(cache), {}, padding=0)
    cache.append(store_into(cache), {}, padding=5)
    assert cache.cache.isnan().all()


def test_what_the_kernel_relies_on_is_checked() -> None:
    cache = PagedCache(for_cpu=True)
    with pytest.raises(ValueError, match="key_cache, value_cache: strides"):
        cache.append(triton.store, {cache.new_request(): 1})
    cache = new_cache(dtype=torch.float16)
    with pytest.raises(ValueError, match=r"key, value: torch\.float32"):
        cache.append(triton.store, {cache.new_request(): 1}, key=torch.zeros(1, 2, 32))
