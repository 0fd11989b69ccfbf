"""Formats of 4-bit pages, and writing and reading them, for every test of theirs."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cache import PagedCache
from tests.kernels.test_operations import IMPLEMENTATIONS
from vllm_quest.formats.int4.reference import dequantized
from vllm_quest.page import Pages

HEADS, DIM, BLOCK = 2, 64, 64
FORMATS = [(8, "int8", None), (16, "int8", None), (16, "bfloat16", 32)]  # page size, bounds, groups of V
EVERY_FORMAT = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f"{f[0]}-{f[1]}-{f[2]}")
EVERY_IMPLEMENTATION = pytest.mark.parametrize("ops", IMPLEMENTATIONS)


def new_cache(format: tuple[int, str, int], seed: int = 0, dtype: torch.dtype = torch.float32) -> PagedCache:
    page_size, bounds, group_size = format
    return PagedCache(
        num_blocks=16,
        num_kv_heads=HEADS,
        block_size=BLOCK,
        page_size=page_size,
        head_size=DIM,
        dtype=dtype,
        seed=seed,
        kv_dtype="int4",
        bounds_dtype=bounds,
        value_group_size=group_size,
    )


def write(ops, views: Pages, key: torch.Tensor, chunks: list[int], start: int = 0) -> None:
    """Stores keys ``[T, H, D]``, which are the values as well, from slot `start` on, in chunks."""
    for part in key.split(chunks):
        slots = torch.arange(start, start + len(part))
        ops.store(part.contiguous(), part.contiguous(), views, slots)
        start += len(part)


def stored(views: Pages, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of the first tokens as they are read, ``[T, H, D]`` each."""
    return tuple(part.movedim(1, 2).flatten(0, 1)[:tokens] for part in dequantized(views.cache))
