"""Prefill over pages that vLLM's dense kernels cannot read: K and V lie here in the model's dtype meanwhile.

Before a layer attends, the stored context of the prefilling requests is dequantized into the buffer, and
their new tokens are written behind it as they are. So the new tokens see each other at full precision, and a
prompt's first chunk is computed exactly as without QUEST. All layers share one buffer, which holds the
longest context that the engine allows; requests that do not fit together take turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch

from vllm_quest.block import Block
from vllm_quest.kernels.operations import Operations
from vllm_quest.page import Pages

__all__ = ["PrefillBuffer", "Turn", "allocate", "take_turns"]

ROUNDED_TO = 1024  # tokens: blocks larger than that are not foreseen
_storages: WeakValueDictionary[tuple, torch.Tensor] = WeakValueDictionary()


def allocate(num_kv_heads: int, head_size: int) -> torch.Tensor:
    """The buffer's memory for the engine whose model is being built, the same for all layers.

    What is allocated while the model is built counts as the model's when vLLM sizes its cache.
    """
    from vllm.config import get_current_vllm_config
    from vllm.platforms import current_platform

    model = get_current_vllm_config().model_config
    tokens = -(-model.max_model_len // ROUNDED_TO) * ROUNDED_TO
    key = (tokens * num_kv_heads * 2 * head_size, model.dtype, current_platform.device_type)
    storage = _storages.get(key)
    if storage is None:
        # Zeros: what lies behind a context is masked, but must not be NaN.
        storage = _storages[key] = torch.zeros(key[0], dtype=key[1], device=key[2])
    return storage


@dataclass(frozen=True)
class Turn:
    """Requests that are in the buffer together; their blocks lie there one after the other.

    Attributes:
        requests: ``[r]`` int64, of the batch.
        block_table: ``[r, M]`` int32, their blocks in the buffer.
        blocks: ``[n]`` int32, their blocks in the cache, request by request.
        num_tokens: ``[n]`` int32, how many tokens of each of these blocks are dequantized; the rest is new.
        slots: ``[t]`` int64, where in the buffer their new tokens go.
    """

    requests: torch.Tensor
    block_table: torch.Tensor
    blocks: torch.Tensor
    num_tokens: torch.Tensor
    slots: torch.Tensor


def take_turns(
    requests: torch.Tensor,
    seq_lens: torch.Tensor,
    query_lens: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    capacity: int,
) -> Iterator[Turn]:
    """Distributes prefilling requests over turns of at most `capacity` blocks, in their order.

    Args:
        requests: ``[r]`` int64 on the host, of the batch.
        seq_lens: ``[r]`` tokens of each, new ones included; on the host.
        query_lens: ``[r]`` new tokens of each; on the host.
        block_table: ``[batch, M]`` int32, of the whole batch.
        block_size: Tokens per block.
        capacity: Blocks of the buffer.
    """
    num_blocks = -(-seq_lens // block_size)
    first = 0
    while first < len(requests):
        total = num_blocks[first:].cumsum(0)
        last = first + max(1, int((total <= capacity).sum()))
        yield _turn(
            requests[first:last], seq_lens[first:last], query_lens[first:last], block_table, block_size
        )
        first = last


def _turn(
    requests: torch.Tensor,
    seq_lens: torch.Tensor,
    query_lens: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
) -> Turn:
    num_blocks = -(-seq_lens // block_size)
    starts = num_blocks.cumsum(0) - num_blocks  # each request's first block in the buffer
    request = torch.arange(len(requests)).repeat_interleave(num_blocks)
    column = torch.arange(len(request)) - starts[request]
    contexts = seq_lens - query_lens
    token_request = torch.arange(len(requests)).repeat_interleave(query_lens)
    first_token = query_lens.cumsum(0) - query_lens
    position = contexts[token_request] + torch.arange(len(token_request)) - first_token[token_request]
    device = block_table.device
    columns = torch.arange(int(num_blocks.max()))
    return Turn(
        requests=requests,
        block_table=(starts[:, None] + columns).clamp(max=len(request) - 1).int().to(device),
        blocks=block_table[requests[request].to(device), column.to(device)],
        num_tokens=(contexts[request] - column * block_size).clamp(0, block_size).int().to(device),
        slots=(starts[token_request] * block_size + position).to(device),
    )


class PrefillBuffer:
    """K and V of one turn, in the model's dtype.

    Attributes:
        kv: ``[blocks, H, N, 2 * D]``, a cache as vLLM's dense backend expects it.
    """

    def __init__(self, storage: torch.Tensor, block: Block, num_kv_heads: int) -> None:
        """Cuts `storage` into blocks."""
        shape = (num_kv_heads, block.block_size, 2 * block.head_size)
        size = num_kv_heads * block.block_size * 2 * block.head_size
        self.kv = storage[: len(storage) // size * size].view(-1, *shape)
        self._key, self._value = block.split(self.kv)

    def load(self, operations: Operations, pages: Pages, turn: Turn) -> torch.Tensor:
        """Fills in the stored context of a turn's requests and returns the cache; new tokens come after."""
        operations.dequantize_blocks(pages, turn.blocks, turn.num_tokens, self._key, self._value)
        return self.kv
