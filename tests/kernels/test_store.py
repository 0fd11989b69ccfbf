"""Store: every byte is the reference's, whose bounds are the oracle's.

`PagedCache` compares whatever a device stores with the reference.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import oracle
from tests.kernels.cache import PagedCache
from tests.kernels.conformance import (
    CODED,
    EVERY_COMBINATION,
    EVERY_DEVICE,
    EVERY_LINE,
    EVERY_SMALL,
    EXACT,
    HISTORIES,
    QUIET,
    any_history,
    dtype_on,
    new_cache,
    run_steps,
)
from vllm_quest.kernels.bounds import read_bounds

pytestmark = QUIET


@EVERY_DEVICE
@EVERY_LINE
def test_chunked_prefill_then_decode(device, line) -> None:
    cache = line.cache(device)
    first, second, third = (cache.new_request() for _ in range(3))
    cache.append({first: 577, second: 17}, padding=3)  # in Triton, programs of many tokens
    cache.append({first: 1, second: 63, third: 5}, padding=1)  # and of one; chunks begin inside a page
    for _ in range(2):
        cache.append({first: 1, second: 1, third: 1}, padding=2)
    cache.reject(second, 4)
    cache.append({second: 3, first: 1})
    cache.append({third: 1}, key=torch.full_like(cache.random(1), 50.0))  # the range grows


@EVERY_DEVICE
@EVERY_COMBINATION
def test_any_history(device, entries) -> None:
    """Chunks inside a page, padding, blocks of another request before, shared prefixes, rejected drafts."""
    any_history(HISTORIES[device], lambda steps, seed: run_steps(new_cache(device, entries, seed), steps))


@pytest.mark.parametrize("page_size", [8, 16, 32])
def test_bounds_follow_every_write(page_size) -> None:
    def check(steps, seed) -> None:
        cache = new_cache("reference", EXACT | {"page_size": page_size}, seed)
        run_steps(cache, steps)
        assert_bounds(cache)

    any_history(20, check, drafts=False)  # a rejected one stays in the bounds until the page's next token


def assert_bounds(cache: PagedCache) -> None:
    """Those of the keys that each page has now, exactly."""
    size = cache.layout.block.page_size
    for context in cache.requests.values():
        for page in range(context.num_pages(size)):
            block, within = divmod(page, cache.layout.block.pages)
            stored = cache.pages.summary.values[context.blocks[block], :, within].float().numpy()
            kmin, kmax = oracle.page_bounds(context, page, size)
            np.testing.assert_array_equal(stored[:, 0], kmin)
            np.testing.assert_array_equal(stored[:, 1], kmax)


@pytest.mark.parametrize("page_size", [8, 16])
def test_8_bit_bounds_are_a_step_wider_at_most(page_size) -> None:
    def check(steps, seed) -> None:
        cache = new_cache("reference", CODED | {"page_size": page_size}, seed)
        run_steps(cache, steps)
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

    any_history(10, check, drafts=False)


@EVERY_DEVICE
def test_a_reused_block_forgets_its_owner(device) -> None:
    cache = new_cache(device, EXACT | {"num_blocks": 2, "block_size": 16})
    old = cache.new_request()
    cache.append({old: 32})
    cache.cache[:] *= 1000
    cache.finish(old)
    new = cache.new_request()
    cache.append({new: 3})
    cache.append({new: 6})
    assert_bounds(cache)


@EVERY_DEVICE
def test_a_rejected_draft_leaves_no_trace(device) -> None:
    cache = new_cache(device, EXACT | {"block_size": 16, "page_size": 16})
    request = cache.new_request()
    cache.append({request: 5})
    cache.append({request: 4}, key=torch.full_like(cache.random(4), 1000.0))
    cache.reject(request, 3)  # the first draft token was accepted
    cache.append({request: 2})
    assert_bounds(cache)
    assert cache.pages.summary.values[cache.requests[request].blocks[0], :, 0, 1].amax() == 1000


@EVERY_DEVICE
def test_slices_of_a_fused_projection(device) -> None:
    cache = new_cache(device, EXACT | {"num_kv_heads": 3, "head_size": 112, "dtype": torch.bfloat16})
    fused = torch.randn(21, 5, 2, 112).bfloat16()
    key, value = fused[:, 1:4, 0], fused[:, 1:4, 1]
    assert not key.is_contiguous()
    slots = torch.arange(40, 61)
    cache.store(key, value, slots)
    block, position = slots // 32, slots % 32
    assert torch.equal(cache.pages.cache.key[block, :, position], key)
    assert torch.equal(cache.pages.cache.value[block, :, position], value)


@EVERY_DEVICE
def test_padding_between_tokens(device) -> None:
    cache = new_cache(device, EXACT | {"num_kv_heads": 3, "head_size": 112, "dtype": torch.bfloat16})
    key = torch.randn(5, 3, 112).bfloat16()
    cache.store(key, key, torch.tensor([8, -1, 16, -1, 40]))
    bounds = cache.pages.summary.values
    assert torch.equal(bounds[0, :, 1], key[[0, 0]].transpose(0, 1))
    assert torch.equal(bounds[0, :, 2], key[[2, 2]].transpose(0, 1))
    assert torch.equal(bounds[1, :, 1, 0], key[4])
    assert bounds[0, :, 0].isnan().all()


@EVERY_DEVICE
@EVERY_SMALL
def test_no_tokens_and_only_padding_write_nothing(device, entries) -> None:
    cache = new_cache(device, entries)
    cache.append({}, padding=0)
    cache.append({}, padding=5)
    assert (cache.cache.view(torch.uint8) == 255).all()


@EVERY_DEVICE
@pytest.mark.parametrize("kind", ["constant", "zeros", "outlier", "infinite"])
def test_extreme_keys_in_8_bit_bounds(device, kind) -> None:
    dtype = dtype_on(device, torch.bfloat16)
    cache = new_cache(device, CODED | {"block_size": 16, "dtype": dtype})
    keys = torch.ones(11, 2, 32) if kind == "constant" else torch.randn(11, 2, 32)
    if kind == "zeros":
        keys = torch.zeros(11, 2, 32)
        keys[::2] = -0.0
    if kind in ("outlier", "infinite"):
        keys[4, :, 3] = 3e38 if kind == "outlier" else torch.inf
        keys[9, :, 5] = -3e38 if kind == "outlier" else -torch.inf
    request = cache.new_request()
    cache.append({request: 5}, key=keys[:5].to(dtype))
    cache.append({request: 6}, key=keys[5:].to(dtype))
    blocks = torch.tensor(cache.requests[request].blocks)
    bounds = read_bounds(cache.pages.summary, blocks)[:, :, 0]
    assert not bounds.isnan().any()
    assert bounds.isfinite().all() or kind == "infinite"  # whose bound may be infinite, too
