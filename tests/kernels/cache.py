"""A poisoned paged cache with a tiny block allocator, and the oracle's view of the same requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tests.kernels.device import Kernels, bytes_of
from tests.oracle import Context
from vllm_quest.config import QuestConfig
from vllm_quest.page import PageLayout

TIES = 1e-3  # share of codes that a GPU, which fuses product and sum, may round to the other side


class PagedCache:
    """Requests that own blocks of one layer's cache; everything unwritten is NaN.

    Whatever a device stores is compared with what the reference stores.

    Attributes:
        kernels: The device's.
        reference: The reference's, on the same memory.
    """

    def __init__(
        self,
        device: str = "reference",
        *,
        num_blocks: int = 24,
        num_kv_heads: int = 2,
        block_size: int = 32,
        head_size: int = 32,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        **entries: Any,
    ) -> None:
        """`entries` are those of `QuestConfig`; pages of 8 and exact bounds unless they say otherwise."""
        self.config = QuestConfig(**{"page_size": 8, "bounds_dtype": "auto"} | entries)
        for_cpu = device != "triton"
        self.layout = PageLayout.configured(self.config, block_size, head_size, dtype, for_cpu=for_cpu)
        shape = (num_blocks, num_kv_heads, block_size, self.layout.content_size)
        self.cache = torch.empty(shape, dtype=self.layout.cache_dtype)
        self.cache.view(torch.uint8).fill_(255)  # NaN in every floating dtype
        self.pages = self.layout.views(self.cache)
        self.kernels, self.reference = Kernels(self, device), Kernels(self, "reference")
        self.rng = np.random.default_rng(seed)
        self.free = list(self.rng.permutation(num_blocks))
        self.requests: dict[int, Context] = {}
        self.next_id = 0

    def new_request(self, prefix_of: int | None = None, prefix_blocks: int = 0) -> int:
        """A request, empty or beginning with whole cached blocks of another one."""
        context = Context(blocks=[])
        if prefix_of is not None:
            other = self.requests[prefix_of]
            shared = min(prefix_blocks, len(other.keys) // self.layout.block.block_size)
            tokens = shared * self.layout.block.block_size
            context = Context(other.blocks[:shared], other.keys[:tokens], other.values[:tokens])
        self.requests[self.next_id] = context
        self.next_id += 1
        return self.next_id - 1

    def finish(self, request: int) -> None:
        """Frees the blocks that no other request uses; their content stays, as in vLLM."""
        done = self.requests.pop(request)
        used = {block for context in self.requests.values() for block in context.blocks}
        self.free.extend(block for block in done.blocks if block not in used)

    def reject(self, request: int, count: int) -> None:
        """Forgets the last tokens, as after a rejected draft: at most `count`, none of a shared block."""
        context = self.requests[request]
        others = [other.blocks for other in self.requests.values() if other is not context]
        for _ in range(min(count, len(context.keys))):
            block = context.blocks[(len(context.keys) - 1) // self.layout.block.block_size]
            if any(block in blocks for blocks in others):
                break
            context.keys.pop()
            context.values.pop()

    def append(
        self,
        counts: dict[int, int],
        padding: int = 0,
        *,
        key: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
        store: Callable[..., None] | None = None,
    ) -> None:
        """One step: `counts[request]` new tokens each, in one call of `store`, then padding tokens."""
        total, size = sum(counts.values()) + padding, self.layout.block.block_size
        key = self.random(total) if key is None else key
        value = self.random(total) if value is None else value
        slots, row = [], 0
        for request, count in counts.items():
            context = self.requests[request]
            for _ in range(count):
                position = len(context.keys)
                if position == len(context.blocks) * size:
                    context.blocks.append(self.free.pop(0))
                slots.append(context.blocks[position // size] * size + position % size)
                context.keys.append(key[row].float().numpy())
                context.values.append(value[row].float().numpy())
                row += 1
        (store or self.store)(key, value, torch.tensor(slots + [-1] * padding, dtype=torch.int64))

    def store(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        """As the device does, and to the bit as the reference; on a GPU, but for codes at a tie."""
        if self.kernels.device == "reference":
            return self.reference.store(key, value, slots)
        before = self.cache.clone()
        self.reference.store(key, value, slots)
        expected = bytes_of(self, self.cache)
        self.cache.copy_(before)
        self.kernels.store(key, value, slots)
        different = bytes_of(self, self.cache) != expected
        copies_only = self.config.kv_dtype == self.config.bounds_dtype == "auto"
        if copies_only or self.kernels.where.type == "cpu":
            assert not different.any()
        else:
            assert different.float().mean() < TIES
        return None

    def random(self, rows: int, group: int = 1) -> torch.Tensor:
        """``[rows, H * group, D]`` in the cache's dtype: keys, values or queries."""
        shape = (rows, self.cache.shape[1] * group, self.layout.block.head_size)
        random = torch.from_numpy(self.rng.standard_normal(shape))
        return torch.empty(shape, dtype=self.layout.block.dtype).copy_(random)

    def rows(self, requests: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """block_table [R, M] with garbage behind each context, seq_lens [R], num_pages [R]."""
        contexts = [self.requests[request] for request in requests]
        width = max(len(context.blocks) for context in contexts) + 1
        table = torch.full((len(contexts), width), 2**30, dtype=torch.int32)
        for row, context in enumerate(contexts):
            table[row, : len(context.blocks)] = torch.tensor(context.blocks, dtype=torch.int32)
        seq_lens = torch.tensor([len(context.keys) for context in contexts], dtype=torch.int32)
        return table, seq_lens, -(-seq_lens // self.layout.block.page_size)
