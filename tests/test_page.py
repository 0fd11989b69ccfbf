"""The cut of a KV block: nothing overlaps, nothing is left over but the rounding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vllm_quest.config import QuestConfig
from vllm_quest.page import PageLayout, Pages

ENTRIES = [  # and of how many parts K, V and the bounds consist
    ({"bounds_dtype": "auto"}, 3),
    ({"bounds_dtype": "int8"}, 4),
    ({"kv_dtype": "int4"}, 7),
    ({"kv_dtype": "int4", "bounds_dtype": "bfloat16"}, 6),
]
INT4 = {"kv_dtype": "int4", "value_group_size": 32}


def layout_of(
    block_size: int, page_size: int, head_size: int, dtype: torch.dtype, *, for_cpu: bool = False, **entries
) -> PageLayout:
    config = QuestConfig(**{"page_size": page_size, "bounds_dtype": "auto"} | entries)
    return PageLayout.configured(config, block_size, head_size, dtype, for_cpu=for_cpu)


def leaves(views: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested tuples."""
    if isinstance(views, torch.Tensor):
        yield views
    elif views is not None:
        for part in views:
            yield from leaves(part)


def parts_of(pages: Pages) -> list[torch.Tensor]:
    """Every part once: `kv` is K and V once more, and the summary may be lent by the format."""
    found = [*leaves(pages.cache), *leaves(pages.summary)]
    return list({part.data_ptr(): part for part in found}.values())


@pytest.mark.parametrize("for_cpu", [True, False])
@pytest.mark.parametrize("head_size", [64, 80, 128])
@pytest.mark.parametrize(("block_size", "page_size"), [(16, 16), (32, 8), (128, 16), (128, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("entries", "expected"), ENTRIES)
def test_views_cover_a_run_without_overlap(
    for_cpu, head_size, block_size, page_size, dtype, entries, expected
) -> None:
    layout = layout_of(block_size, page_size, head_size, dtype, for_cpu=for_cpu, **entries)
    covered, parts = 0, len(parts_of(views_of(layout)[1]))
    assert parts == expected
    for index in range(parts):
        whole, views = views_of(layout)
        part = parts_of(views)[index]
        ones = torch.full((part.numel() * part.element_size(),), 255).byte()
        part.copy_(ones.view(part.dtype).view_as(part))
        covered = covered + (whole.view(torch.uint8) != 0).int()  # the bytes of this part
    assert covered.max() == 1
    assert not covered[:, 0].any()
    unused = layout.content_bytes * block_size - int(covered[0, 1, 0].sum())
    assert unused < 16 * parts + block_size * layout.cache_dtype.itemsize


def views_of(layout: PageLayout) -> tuple[torch.Tensor, Pages]:
    """A cache of zeros that two layers share block by block, as vLLM may do, and the second one's views."""
    shape = (3, 2, 3, layout.block.block_size, layout.content_size)
    whole = torch.zeros(shape, dtype=layout.cache_dtype)
    return whole, layout.views(whole[:, 1])


def test_shapes_and_orders() -> None:
    gpu = layout_of(32, 8, 64, torch.float32)
    cpu = layout_of(32, 8, 64, torch.float32, for_cpu=True)
    cache = torch.arange(4 * 2 * 32 * gpu.content_size).view(4, 2, 32, -1).float()
    for_gpu, for_cpu = gpu.views(cache), cpu.views(cache)
    run = cache[1, 1].flatten()[: 2 * 32 * 64]
    assert torch.equal(for_gpu.cache.key[1, 1], run.view(32, 2, 64)[:, 0])
    assert torch.equal(for_gpu.cache.value[1, 1], run.view(32, 2, 64)[:, 1])
    assert torch.equal(for_cpu.cache.key[1, 1], run[: 32 * 64].view(64, 32).T)
    assert torch.equal(for_cpu.cache.value[1, 1], run[32 * 64 :].view(32, 64))
    assert torch.equal(for_gpu.kv[1, 1].flatten(), run)
    assert torch.equal(for_cpu.kv[1, 1].flatten(), run)
    assert for_gpu.summary.values.shape == (4, 2, 4, 2, 64)


def test_orders_of_int4_pages() -> None:
    gpu = layout_of(32, 8, 64, torch.bfloat16, **INT4)
    cpu = layout_of(32, 8, 64, torch.bfloat16, for_cpu=True, **INT4)
    cache = torch.randint(256, (4, 2, 32, gpu.content_size)).byte()
    for_gpu, for_cpu = gpu.views(cache), cpu.views(cache)
    codes = cache[1, 1].flatten()[: 4 * 4 * 64]
    assert torch.equal(for_gpu.cache.key.codes[1, 1], codes.view(4, 4, 64))
    assert torch.equal(for_cpu.cache.key.codes[1, 1], codes.view(4, 64, 4).mT)
    assert torch.equal(for_gpu.cache.value.codes, for_cpu.cache.value.codes)
    assert for_gpu.cache.key.residual.shape == for_gpu.cache.value.residual.shape == (4, 2, 4, 64)
    assert torch.equal(for_gpu.cache.value.residual, for_cpu.cache.value.residual)
    assert for_gpu.cache.value.params.shape == (4, 2, 32, 2, 2)
    assert for_gpu.cache.value.params.dtype == torch.bfloat16
    assert for_gpu.summary.params.shape == (4, 2, 4, 2)
    assert for_gpu.kv is None


def test_metadata_share() -> None:
    assert layout_of(16, 16, 128, torch.bfloat16).metadata_share == pytest.approx(1 / 17)
    assert layout_of(16, 8, 128, torch.bfloat16).metadata_share == pytest.approx(1 / 9)
    # The codes of 2 * 128 channels take 128 bytes per token.
    int4 = layout_of(128, 16, 128, torch.bfloat16, kv_dtype="int4")
    assert int4.metadata_share == pytest.approx(1 - 128 / int4.content_bytes)


def test_int4_takes_less_than_a_third() -> None:
    def share(block_size: int, bounds_dtype: str) -> float:
        layout = layout_of(block_size, 16, 128, torch.bfloat16, kv_dtype="int4", bounds_dtype=bounds_dtype)
        return layout.content_bytes / (2 * 128 * 2)

    assert share(512, "int8") <= 0.30
    assert share(128, "int8") <= 0.33
    assert share(512, "bfloat16") <= 0.33


def test_bounds_of_int4_pages_have_8_bits_unless_told_otherwise() -> None:
    auto, int8, bfloat16, dense = (
        layout_of(128, 16, 128, torch.float16, kv_dtype=kv_dtype, bounds_dtype=bounds_dtype)
        for kv_dtype, bounds_dtype in [
            ("int4", "auto"),
            ("int4", "int8"),
            ("int4", "bfloat16"),
            ("auto",) * 2,
        ]
    )

    def bounds(layout: PageLayout) -> tuple[torch.dtype, int]:
        dtype = views_of(layout)[1].summary.values.dtype
        return dtype, layout.scorer.page_bytes(layout.block, layout.format)

    assert auto.content_bytes == int8.content_bytes == 165
    assert bounds(auto) == bounds(int8) == (torch.uint8, 2 * 128 + 8)
    assert bounds(bfloat16) == (torch.bfloat16, 2 * 128 * 2)
    assert bounds(dense) == (torch.float16, 2 * 128 * 2)


def test_page_size_must_divide_the_block() -> None:
    with pytest.raises(ValueError, match=r"page_size.*64.*--block-size 32"):
        layout_of(32, 64, 128, torch.bfloat16)


def test_value_groups_must_divide_the_head() -> None:
    with pytest.raises(ValueError, match=r"value_group_size.*80"):
        layout_of(32, 16, 80, torch.bfloat16, **INT4)


def test_a_foreign_cache_is_refused() -> None:
    layout = layout_of(32, 8, 64, torch.float32)
    with pytest.raises(ValueError, match="expected a cache"):
        layout.views(torch.zeros(4, 2, 32, 128))
    with pytest.raises(ValueError, match="expected a cache"):
        layout.views(torch.zeros(4, 2, 32, layout.content_size, dtype=torch.bfloat16))
    cache = torch.zeros(4, 32, 2, layout.content_size).transpose(1, 2)
    with pytest.raises(ValueError, match="contiguous"):
        layout.views(cache)
