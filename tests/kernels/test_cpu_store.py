"""The compiled `store`: random sequences of writes against the oracle, and what vLLM passes in."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.by_device import cpu
from tests.kernels.cache import PagedCache
from tests.kernels.test_operations import STEPS, assert_bounds, run_steps


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(steps=STEPS, seed=st.integers(0, 99))
def test_bfloat16_bounds_follow_every_write(steps, seed) -> None:
    """Chunks that end inside a page, single tokens, padding, blocks that another request had before."""
    cache = PagedCache(num_kv_heads=3, page_size=8, head_size=112, dtype=torch.bfloat16, seed=seed)
    run_steps(cache, cpu.store, steps)
    assert_bounds(cache)


def test_slices_of_a_fused_projection() -> None:
    cache = PagedCache(num_kv_heads=3, page_size=8, head_size=112, dtype=torch.bfloat16)
    fused = torch.randn(21, 5, 2, 112).bfloat16()
    key, value = fused[:, 1:4, 0], fused[:, 1:4, 1]
    assert not key.is_contiguous()
    views, slots = cache.pages, torch.arange(40, 61)
    cpu.store(key, value, views, slots)
    block, position = slots // 32, slots % 32
    assert torch.equal(views.cache.key[block, :, position], key)
    assert torch.equal(views.cache.value[block, :, position], value)


def test_a_rejected_draft_leaves_the_bounds() -> None:
    cache = PagedCache(num_kv_heads=3, page_size=8, head_size=112, dtype=torch.bfloat16)
    views = cache.pages
    key = torch.zeros(4, 3, 112).bfloat16()
    key[2:] = 9
    cpu.store(key, key, views, torch.arange(4))
    assert (views.summary.values[0, :, 0, 1] == 9).all()
    accepted = torch.ones(1, 3, 112).bfloat16()
    cpu.store(accepted, accepted, views, torch.tensor([2]))
    assert (views.summary.values[0, :, 0, 0] == 0).all()
    assert (views.summary.values[0, :, 0, 1] == 1).all()


def test_padding_between_tokens() -> None:
    cache = PagedCache(num_kv_heads=3, page_size=8, head_size=112, dtype=torch.bfloat16)
    views = cache.pages
    key = torch.randn(5, 3, 112).bfloat16()
    cpu.store(key, key, views, torch.tensor([8, -1, 9, -1, 16]))
    kept = key[[0, 2]]
    assert torch.equal(views.summary.values[0, :, 1, 0], kept.amin(0))
    assert torch.equal(views.summary.values[0, :, 1, 1], kept.amax(0))
    assert torch.equal(views.summary.values[0, :, 2, 0], key[4])
    assert views.summary.values[0, :, 0].isnan().all()
