"""The cut of a KV block: nothing overlaps, nothing is left over but the rounding."""

from __future__ import annotations

import pytest
import torch
from vllm_quest.layout import Int4Keys, Int4Values, PageLayout, PageViews

FORMATS = [("auto", "auto"), ("auto", "int8"), ("int4", "auto"), ("int4", "bfloat16")]


def tensors(views: PageViews) -> dict[str, torch.Tensor]:
    """Every part of the views by name, but for `kv`, which is K and V once more."""
    found = {"bounds": views.bounds.values}
    if views.bounds.params is not None:
        found["bound_params"] = views.bounds.params
    if isinstance(views.key, Int4Keys) and isinstance(views.value, Int4Values):
        found |= {"key": views.key.codes, "key_residual": views.key.residual}
        found |= {"value": views.value.codes, "value_residual": views.value.residual}
        return found | {"value_params": views.value.params}
    return found | {"key": views.key, "value": views.value}


@pytest.mark.parametrize("for_cpu", [True, False])
@pytest.mark.parametrize("head_size", [64, 80, 128])
@pytest.mark.parametrize(("block_size", "page_size"), [(16, 16), (32, 8), (128, 16), (128, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kv_dtype", "metadata_dtype"), FORMATS)
def test_views_cover_a_run_without_overlap(
    for_cpu, head_size, block_size, page_size, dtype, kv_dtype, metadata_dtype
) -> None:
    layout = PageLayout(block_size, page_size, head_size, for_cpu, dtype, kv_dtype, metadata_dtype)
    covered = 0
    for name in tensors(views_of(layout)[1]):
        whole, views = views_of(layout)
        part = tensors(views)[name]
        ones = torch.full((part.numel() * part.element_size(),), 255).byte()
        part.copy_(ones.view(part.dtype).view_as(part))
        covered = covered + (whole.view(torch.uint8) != 0).int()  # the bytes of this part
    assert covered.max() == 1
    assert not covered[:, 0].any()
    unused = layout.content_bytes * block_size - int(covered[0, 1, 0].sum())
    assert unused < 16 * len(tensors(views)) + block_size * layout.cache_dtype.itemsize


def views_of(layout: PageLayout) -> tuple[torch.Tensor, PageViews]:
    """A cache of zeros that two layers share block by block, as vLLM may do, and the second one's views."""
    shape = (3, 2, 3, layout.block_size, layout.content_size)
    whole = torch.zeros(shape, dtype=layout.cache_dtype)
    return whole, layout.views(whole[:, 1])


def test_shapes_and_orders() -> None:
    gpu = PageLayout(32, 8, 64, False, torch.float32)
    cpu = PageLayout(32, 8, 64, True, torch.float32)
    cache = torch.arange(4 * 2 * 32 * gpu.content_size).view(4, 2, 32, -1).float()
    for_gpu, for_cpu = gpu.views(cache), cpu.views(cache)
    run = cache[1, 1].flatten()[: 2 * 32 * 64]
    assert torch.equal(for_gpu.key[1, 1], run.view(32, 2, 64)[:, 0])
    assert torch.equal(for_gpu.value[1, 1], run.view(32, 2, 64)[:, 1])
    assert torch.equal(for_cpu.key[1, 1], run[: 32 * 64].view(64, 32).T)
    assert torch.equal(for_cpu.value[1, 1], run[32 * 64 :].view(32, 64))
    assert torch.equal(for_gpu.kv[1, 1].flatten(), run)
    assert torch.equal(for_cpu.kv[1, 1].flatten(), run)
    assert for_gpu.bounds.values.shape == (4, 2, 4, 2, 64)


def test_orders_of_int4_pages() -> None:
    gpu = PageLayout(32, 8, 64, False, torch.bfloat16, "int4", "int8", value_groups=2)
    cpu = PageLayout(32, 8, 64, True, torch.bfloat16, "int4", "int8", value_groups=2)
    cache = torch.randint(256, (4, 2, 32, gpu.content_size)).byte()
    for_gpu, for_cpu = gpu.views(cache), cpu.views(cache)
    codes = cache[1, 1].flatten()[: 4 * 4 * 64]
    assert torch.equal(for_gpu.key.codes[1, 1], codes.view(4, 4, 64))
    assert torch.equal(for_cpu.key.codes[1, 1], codes.view(4, 64, 4).mT)
    assert torch.equal(for_gpu.value.codes, for_cpu.value.codes)
    assert for_gpu.key.residual.shape == for_gpu.value.residual.shape == (4, 2, 4, 64)
    assert torch.equal(for_gpu.value.residual, for_cpu.value.residual)
    assert for_gpu.value.params.shape == (4, 2, 32, 2, 2)
    assert for_gpu.value.params.dtype == torch.bfloat16
    assert for_gpu.bounds.params.shape == (4, 2, 4, 2)
    assert for_gpu.kv is None


def test_metadata_share() -> None:
    assert PageLayout(16, 16, 128, False, torch.bfloat16).metadata_share == pytest.approx(1 / 17)
    assert PageLayout(16, 8, 128, False, torch.bfloat16).metadata_share == pytest.approx(1 / 9)
    # The codes of 2 * 128 channels take 128 bytes per token.
    int4 = PageLayout(128, 16, 128, False, torch.bfloat16, "int4", "int8")
    assert int4.metadata_share == pytest.approx(1 - 128 / int4.content_bytes)


def test_int4_takes_less_than_a_third() -> None:
    def share(block_size: int, metadata_dtype: str) -> float:
        layout = PageLayout(block_size, 16, 128, False, torch.bfloat16, "int4", metadata_dtype)
        return layout.content_bytes / (2 * 128 * 2)

    assert share(512, "int8") <= 0.30
    assert share(128, "int8") <= 0.33
    assert share(512, "bfloat16") <= 0.33


def test_bounds_of_int4_pages_have_8_bits_unless_told_otherwise() -> None:
    auto, int8, bfloat16 = (
        PageLayout(128, 16, 128, False, torch.float16, "int4", metadata_dtype)
        for metadata_dtype in ("auto", "int8", "bfloat16")
    )
    assert auto.bounds_dtype == int8.bounds_dtype == torch.uint8
    assert auto.content_bytes == int8.content_bytes == 165
    assert auto.bounds_bytes == int8.bounds_bytes == 2 * 128 + 8
    assert bfloat16.bounds_dtype == torch.bfloat16
    assert bfloat16.bounds_bytes == 2 * 128 * 2
    assert PageLayout(128, 16, 128, False, torch.float16).bounds_dtype == torch.float16


def test_page_size_must_divide_the_block() -> None:
    with pytest.raises(ValueError, match=r"page_size.*64.*--block-size 32"):
        PageLayout(32, 64, 128, False, torch.bfloat16)


def test_value_groups_must_divide_the_head() -> None:
    with pytest.raises(ValueError, match=r"value_group_size.*80"):
        PageLayout(32, 16, 80, False, torch.bfloat16, "int4", value_groups=3)


def test_a_foreign_cache_is_refused() -> None:
    layout = PageLayout(32, 8, 64, False, torch.float32)
    with pytest.raises(ValueError, match="expected a cache"):
        layout.views(torch.zeros(4, 2, 32, 128))
    with pytest.raises(ValueError, match="expected a cache"):
        layout.views(torch.zeros(4, 2, 32, layout.content_size, dtype=torch.bfloat16))
    cache = torch.zeros(4, 32, 2, layout.content_size).transpose(1, 2)
    with pytest.raises(ValueError, match="contiguous"):
        layout.views(cache)
