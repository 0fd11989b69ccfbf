"""The cut of a KV block: nothing overlaps, nothing is left over but the rounding."""

from __future__ import annotations

import pytest
import torch

from vllm_quest.layout import PageLayout


@pytest.mark.parametrize("for_cpu", [True, False])
@pytest.mark.parametrize("head_size", [64, 80, 96, 128])
@pytest.mark.parametrize(("block_size", "page_size"), [(16, 16), (32, 8), (128, 16), (64, 64), (128, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_views_cover_a_run_without_overlap(for_cpu, head_size, block_size, page_size, dtype) -> None:
    layout = PageLayout(block_size, page_size, head_size, for_cpu)
    content = PageLayout.content_size(page_size, head_size)
    # vLLM may put other layers between two blocks of one layer: a block stride larger than the block.
    whole = torch.zeros(5, 2, 3, block_size, content, dtype=dtype)
    views = layout.views(whole[:, 1])
    for part, view in enumerate((views.key, views.value, views.bounds), start=1):
        view += part
    used = 2 * block_size * head_size + 2 * layout.pages_per_block * head_size
    run = whole[:, 1].reshape(5, 3, -1)
    tokens = run[..., : 2 * block_size * head_size]
    if for_cpu:
        keys, values = tokens.split(block_size * head_size, dim=-1)
    else:
        keys, values = tokens.view(5, 3, block_size, 2, head_size).unbind(-2)
    assert keys.eq(1).all()
    assert values.eq(2).all()
    assert run[..., 2 * block_size * head_size : used].eq(3).all()
    assert run[..., used:].eq(0).all()
    assert run.shape[-1] - used < block_size
    assert whole[:, 0].eq(0).all()


def test_shapes_and_orders() -> None:
    cache = torch.zeros(4, 2, 32, PageLayout.content_size(8, 64))
    gpu = PageLayout(32, 8, 64, False).views(cache)
    cpu = PageLayout(32, 8, 64, True).views(cache)
    assert gpu.key.shape == cpu.key.shape == (4, 2, 32, 64)
    assert gpu.key.stride()[2:] == gpu.value.stride()[2:] == (128, 1)
    assert cpu.key.stride()[2:] == (1, 32)
    assert gpu.bounds.shape == (4, 2, 4, 2, 64)
    assert gpu.kv.shape == (4, 2, 32, 128)


def test_metadata_share() -> None:
    assert PageLayout(16, 16, 128, False).metadata_share == pytest.approx(1 / 17)
    assert PageLayout(16, 8, 128, False).metadata_share == pytest.approx(1 / 9)


def test_page_size_must_divide_the_block() -> None:
    with pytest.raises(ValueError, match=r"page_size.*64.*--block-size 32"):
        PageLayout(32, 64, 128, False)


def test_a_foreign_cache_is_refused() -> None:
    layout = PageLayout(32, 8, 64, False)
    with pytest.raises(ValueError, match="expected a cache"):
        layout.views(torch.zeros(4, 2, 32, 128))
    cache = torch.zeros(4, 32, 2, PageLayout.content_size(8, 64)).transpose(1, 2)
    with pytest.raises(ValueError, match="contiguous"):
        layout.views(cache)
