"""Formats of 4-bit pages, and writing and reading them, for every test of their properties."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cache import PagedCache
from tests.kernels.conformance import COMBINATIONS
from vllm_quest.formats.int4.reference import dequantized

HEADS, GROUP, DIM, BLOCK = 2, 3, 64, 64
EVERY_FORMAT = pytest.mark.parametrize(
    "entries",
    [entries for entries in COMBINATIONS if entries.get("kv_dtype") == "int4"],
    ids=lambda entries: f"{entries['page_size']}-{entries['bounds_dtype']}",
)
# Triton's programs are compared with the reference, which has these properties.
EVERY_DEVICE = pytest.mark.parametrize("device", ["reference", "cpu"])


def write(cache: PagedCache, key: torch.Tensor, chunks: list[int], start: int = 0) -> None:
    """Stores keys ``[T, H, D]``, which are the values as well, from slot `start` on, in chunks."""
    for part in key.split(chunks):
        cache.store(part.contiguous(), part.contiguous(), torch.arange(start, start + len(part)))
        start += len(part)


def stored(cache: PagedCache, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of the first tokens as they are read, ``[T, H, D]`` each."""
    return tuple(part.movedim(1, 2).flatten(0, 1)[:tokens] for part in dequantized(cache.pages.cache))


def attended(cache: PagedCache, query: torch.Tensor, length: int, scale: float) -> torch.Tensor:
    """Attention over all pages of a context that begins in block 0."""
    table, seq_lens = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([length], dtype=torch.int32)
    return cache.kernels.attend_pages(query, table, seq_lens, None, scale)
