"""What the Triton store takes and what it refuses."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cache import PagedCache
from tests.kernels.conformance import EXACT, new_cache
from tests.kernels.interpreter import DEVICE, DTYPES
from vllm_quest.config import QuestConfig
from vllm_quest.page import PageLayout
from vllm_quest.scorers.minmax.triton import store


def test_strides_of_blocks_and_heads_are_free() -> None:
    layout = PageLayout.configured(QuestConfig(**EXACT), 16, 32, DTYPES[0], for_cpu=False)
    shape = (3, 5, 16, layout.content_size)  # heads before blocks
    cache = torch.full(shape, torch.nan, device=DEVICE, dtype=DTYPES[0])
    pages = layout.views(cache.transpose(0, 1))
    qkv = torch.randn(9, 3, 5, 32, device=DEVICE).to(DTYPES[0])  # keys and values as slices of one projection
    key, value = qkv[:, 1, :3], qkv[:, 2, :3]
    store(key, value, pages.cache, pages.summary, torch.arange(21, 30, device=DEVICE))
    torch.testing.assert_close(pages.cache.key[1, :, 5:14], key.transpose(0, 1), rtol=0, atol=0)
    torch.testing.assert_close(pages.cache.value[1, :, 5:14], value.transpose(0, 1), rtol=0, atol=0)
    torch.testing.assert_close(pages.summary.values[1, :, 1, 1], key[3:].amax(0), rtol=0, atol=0)


def test_what_the_kernel_relies_on_is_checked() -> None:
    channel_major, cache = PagedCache("cpu").pages, new_cache("triton", EXACT | {"dtype": torch.float16})
    key, slots = torch.zeros(1, 2, 32), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="key_cache, value_cache: strides"):
        store(key, key, channel_major.cache, channel_major.summary, slots)
    with pytest.raises(ValueError, match=r"key, value: torch\.float32"):
        store(key, key, cache.pages.cache, cache.pages.summary, slots)
