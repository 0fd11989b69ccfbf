"""Prefill over 4-bit pages: where K and V lie in the model's dtype while vLLM's dense kernels read them.

Before a layer attends, the stored context of the prefilling requests is dequantized into the workspace, and
their new tokens are written behind it as they are. So the new tokens see each other at full precision, and a
prompt's first chunk is computed exactly as without QUEST. All layers share one workspace, which holds the
longest context that the engine allows; requests that do not fit together take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch

from vllm_quest.layout import Int4Keys, Int4Values, PageLayout, PageViews

__all__ = ["Turn", "Workspace", "allocate", "take_turns"]

ROUNDED_TO = 1024  # tokens: blocks larger than that are not foreseen
_storages: WeakValueDictionary[tuple, torch.Tensor] = WeakValueDictionary()


def allocate(num_kv_heads: int, head_size: int) -> torch.Tensor:
    """The workspace's memory for the engine whose model is being built, the same for all layers.

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
    """Requests that are in the workspace together; their blocks lie there one after the other.

    Attributes:
        requests: ``[r]`` int64, of the batch.
        block_table: ``[r, M]`` int32, their blocks in the workspace.
        blocks: ``[n]`` int32, their blocks in the cache, request by request.
        num_tokens: ``[n]`` int32, how many tokens of each of these blocks are dequantized; the rest is new.
        slots: ``[t]`` int64, where in the workspace their new tokens go.
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
        capacity: Blocks of the workspace.
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
    starts = num_blocks.cumsum(0) - num_blocks  # each request's first block in the workspace
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


class Workspace:
    """K and V of one turn, in the model's dtype.

    Attributes:
        kv: ``[blocks, H, N, 2 * D]``, a cache as vLLM's dense backend expects it.
    """

    def __init__(self, storage: torch.Tensor, layout: PageLayout, num_kv_heads: int) -> None:
        """Cuts `storage` into blocks of `layout`."""
        shape = (num_kv_heads, layout.block_size, 2 * layout.head_size)
        block = num_kv_heads * layout.block_size * 2 * layout.head_size
        self.kv = storage[: len(storage) // block * block].view(-1, *shape)
        self._key, self._value = layout.split(self.kv)

    def load(self, dequantize_blocks: Callable[..., None], pages: PageViews, turn: Turn) -> torch.Tensor:
        """Fills in the stored context of a turn's requests and returns the cache; new tokens come after."""
        assert isinstance(pages.key, Int4Keys)
        assert isinstance(pages.value, Int4Values)
        dequantize_blocks(pages.key, pages.value, turn.blocks, turn.num_tokens, self._key, self._value)
        return self.kv
