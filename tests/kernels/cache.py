"""A poisoned paged cache with a tiny block allocator, and the oracle's view of the same requests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.oracle import Context
from vllm_quest.config import QuestConfig
from vllm_quest.page import PageLayout


class PagedCache:
    """Requests that own blocks of one layer's cache; everything unwritten is NaN."""

    def __init__(
        self,
        *,
        num_blocks: int = 24,
        num_kv_heads: int = 2,
        block_size: int = 32,
        page_size: int = 8,
        head_size: int = 32,
        dtype: torch.dtype = torch.float32,
        for_cpu: bool = True,
        seed: int = 0,
        **formats: Any,
    ) -> None:
        self.config = QuestConfig(**{"page_size": page_size, "bounds_dtype": "auto"} | formats)
        self.layout = PageLayout.configured(self.config, block_size, head_size, dtype, for_cpu=for_cpu)
        shape = (num_blocks, num_kv_heads, block_size, self.layout.content_size)
        self.cache = torch.empty(shape, dtype=self.layout.cache_dtype)
        self.cache.view(torch.uint8).fill_(255)  # NaN in every floating dtype
        self.pages = self.layout.views(self.cache)
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
        self, store, counts: dict[int, int], padding: int = 0, key: torch.Tensor | None = None
    ) -> None:
        """One step: `counts[request]` new tokens each, in one call of `store`, then padding tokens."""
        heads, dim = self.cache.shape[1], self.layout.block.head_size
        total = sum(counts.values()) + padding
        if key is None:
            key = torch.from_numpy(self.rng.standard_normal((total, heads, dim))).to(self.layout.block.dtype)
        value = torch.from_numpy(self.rng.standard_normal((total, heads, dim))).to(self.layout.block.dtype)
        slots, row = [], 0
        for request, count in counts.items():
            context = self.requests[request]
            for _ in range(count):
                position = len(context.keys)
                if position == len(context.blocks) * self.layout.block.block_size:
                    context.blocks.append(self.free.pop(0))
                block = context.blocks[position // self.layout.block.block_size]
                slots.append(block * self.layout.block.block_size + position % self.layout.block.block_size)
                context.keys.append(key[row].float().numpy())
                context.values.append(value[row].float().numpy())
                row += 1
        slot_mapping = torch.tensor(slots + [-1] * padding, dtype=torch.int64)
        store(key, value, self.pages, slot_mapping)

    def rows(self, requests: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """block_table [R, M] with garbage behind each context, seq_lens [R], num_pages [R]."""
        contexts = [self.requests[request] for request in requests]
        width = max(len(context.blocks) for context in contexts) + 1
        table = torch.full((len(contexts), width), 2**30, dtype=torch.int32)
        for row, context in enumerate(contexts):
            table[row, : len(context.blocks)] = torch.tensor(context.blocks, dtype=torch.int32)
        seq_lens = torch.tensor([len(context.keys) for context in contexts], dtype=torch.int32)
        return table, seq_lens, (seq_lens + self.layout.block.page_size - 1) // self.layout.block.page_size
