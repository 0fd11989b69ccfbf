"""What a device runs of a format and a scorer: as `Operations` puts it together, with every argument free."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from vllm_quest.kernels import operations
from vllm_quest.page import Pages

if TYPE_CHECKING:
    from tests.kernels.cache import PagedCache

__all__ = ["DEVICES", "Kernels", "bytes_of", "where"]

DEVICES = {"reference": "vllm_quest.kernels.reference", **operations.DEVICES}


def where(device: str) -> torch.device:
    """Where a device's tensors are; Triton without a GPU has its interpreter, see `interpreter`."""
    return torch.device("cuda" if device == "triton" and torch.cuda.is_available() else "cpu")


class Kernels:
    """The operations of one device on the memory of a `PagedCache`, which is the CPU's, as are all tensors.

    A GPU works on a copy, and what it stores comes back.
    """

    def __init__(self, cache: PagedCache, device: str) -> None:
        kv_format, scorer = cache.layout.format, cache.layout.scorer
        self.device, self.where = device, where(device)
        self._cache = cache
        self._format = import_module(kv_format.kernels[device])
        self._scorer = import_module(scorer.kernels[device])
        self._device = import_module(DEVICES[device])
        self._fused = getattr(self._scorer, "STORES", {}).get(kv_format.name)
        self._borrows = kv_format.name in scorer.borrows

    def store(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        """In one pass where the scorer has one."""
        memory = self._cache.cache.to(self.where)
        pages = self._cache.layout.views(memory)
        key, value, slots = self._moved(key, value, slots)
        if self._fused is not None:
            self._fused(key, value, pages.cache, pages.summary, slots)
        else:
            self._format.store(key, value, pages.cache, slots)
            if not self._borrows:
                self._scorer.summarize(key, pages.cache, pages.summary, slots)
        if memory is not self._cache.cache:
            self._cache.cache.copy_(memory)

    def score_pages(
        self,
        query: torch.Tensor,
        table: torch.Tensor,
        num_pages: torch.Tensor,
        scale: float,
        group_reduce: str = "max",
        **options: Any,
    ) -> torch.Tensor:
        query, table, num_pages = self._moved(query, table, num_pages)
        summary = self._pages().summary
        return self._scorer.score_pages(
            query, summary, table, num_pages, scale, group_reduce, **options
        ).cpu()

    def select_pages(
        self, scores: torch.Tensor, num_pages: torch.Tensor, *budget: int, **options: Any
    ) -> torch.Tensor:
        """`budget` is K, first pages and last pages that are always kept."""
        select = getattr(self._scorer, "select_pages", self._device.select_pages)
        return select(*self._moved(scores, num_pages), *budget, **options).cpu()

    def attend_pages(
        self,
        query: torch.Tensor,
        table: torch.Tensor,
        seq_lens: torch.Tensor,
        page_indices: torch.Tensor | None,
        scale: float,
        **options: Any,
    ) -> torch.Tensor:
        query, *rows = self._moved(query, table, seq_lens, page_indices)
        pages, page_size = self._pages(), self._cache.layout.block.page_size
        return self._format.attend_pages(query, pages.cache, *rows, page_size, scale, **options).cpu()

    def dequantize_blocks(
        self, blocks: torch.Tensor, num_tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V, and behind them a block that is not written; as the device's dense kernels read them."""
        heads, block = self._cache.cache.shape[1], self._cache.layout.block
        shape = (len(blocks) + 1, heads, block.block_size, 2 * block.head_size)
        out = torch.full(shape, torch.nan, dtype=block.dtype, device=self.where)
        arguments = self._moved(blocks, num_tokens)
        self._format.dequantize_blocks(self._pages().cache, *arguments, *block.split(out))
        return block.split(out.cpu())

    def _pages(self) -> Pages:
        cache = self._cache
        return cache.pages if self.where.type == "cpu" else cache.layout.views(cache.cache.to(self.where))

    def _moved(self, *tensors: torch.Tensor | None) -> list[Any]:
        return [tensor if tensor is None else tensor.to(self.where) for tensor in tensors]


def bytes_of(cache: PagedCache, memory: torch.Tensor) -> torch.Tensor:
    """Every byte of a cache's memory, but that computed numbers have no negative zeros."""
    memory = memory.clone()
    pages = cache.layout.views(memory)
    computed = (pages.summary,) if pages.kv is not None else (pages.summary, pages.cache)
    for part in leaves(computed):
        if part.is_floating_point():
            part += 0.0
    return memory.view(torch.uint8)


def leaves(parts: Any) -> list[torch.Tensor]:
    """The tensors in nested tuples."""
    if isinstance(parts, torch.Tensor):
        return [parts]
    return [leaf for part in parts for leaf in leaves(part)] if isinstance(parts, tuple) else []
