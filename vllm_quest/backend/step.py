"""One step of a KV group: which tokens run which kernels. Decided once per step, for all layers.

A request decodes when its prompt is done and it brings no more tokens than one speculative verification; the
device says what is a prompt. Decode rows whose context is long enough select pages. The other tokens are left
to vLLM's dense kernel: prefill, and short contexts where that kernel can read the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vllm_quest.backend.prefill import Turn
from vllm_quest.config import QuestConfig
from vllm_quest.kernels.operations import Rows

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata

__all__ = [
    "Cut",
    "DecodeRows",
    "DenseRows",
    "Step",
    "joined",
    "pages_to_score",
    "part_of",
    "row_owners",
    "token_indices",
]


@dataclass(frozen=True)
class DecodeRows(Rows):
    """The query tokens that our kernels attend to.

    Attributes:
        tokens: Where they are in the batch's query: a slice where they lie together, else ``[R]`` int64.
    """

    tokens: slice | torch.Tensor


@dataclass(frozen=True)
class DenseRows:
    """What one call of vLLM's kernel attends to.

    Attributes:
        tokens: Their query tokens, as in `DecodeRows`.
        metadata: vLLM's metadata of these tokens alone.
        turn: What has to lie in the prefill buffer; None where vLLM's kernel reads the cache itself.
    """

    tokens: slice | torch.Tensor
    metadata: Any
    turn: Turn | None = None


@dataclass
class Step:
    """The metadata of one step. Not frozen: vLLM sets attributes of its own on some models' metadata.

    Attributes:
        decode: The decode rows; None where there are none.
        dense: The other tokens: none, all in one, or turn by turn.
        whole: The whole batch, for dense layers; None where no layer needs it, and where vLLM's kernel cannot
            read the cache: then dense layers cut the batch as sparse ones do.
    """

    decode: DecodeRows | None
    dense: tuple[DenseRows, ...]
    whole: DenseRows | None


@dataclass(frozen=True)
class Cut:
    """How many of each request's query tokens are what, on the host.

    Attributes:
        decode_lens: ``[requests]`` int64, tokens that decode: the request's last ones.
        own_lens: ``[requests]`` int64, those of them that our kernels attend to, its last ones.
    """

    decode_lens: torch.Tensor
    own_lens: torch.Tensor


def pages_to_score(seq_lens: torch.Tensor, config: QuestConfig) -> torch.Tensor:
    """Pages in each row's context, ``[R]`` int32; 0 where it is too short to select: `sparse_context`."""
    num_pages = (seq_lens + config.page_size - 1) // config.page_size
    return num_pages.where(seq_lens >= config.sparse_context, 0).int()


def row_owners(lens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of requests with `lens` tokens each, a row a token: its request, and how many tokens come after it."""
    request = torch.arange(len(lens)).repeat_interleave(lens)
    ends = lens.cumsum(0)
    return request, ends[request] - 1 - torch.arange(len(request))


def token_indices(firsts: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
    """Indices of `lens` query tokens from `firsts` on, request by request, ``[sum of lens]`` int64."""
    request, after = row_owners(lens)
    return (firsts + lens - 1)[request] - after


def joined(tokens: torch.Tensor) -> slice | torch.Tensor:
    """Ascending indices ``[n]`` as a slice where they follow each other."""
    first, last = int(tokens[0]), int(tokens[-1])
    return slice(first, last + 1) if last - first + 1 == len(tokens) else tokens


def part_of(
    batch: CommonAttentionMetadata, requests: torch.Tensor, cut: Cut, turn: Turn | None
) -> tuple[slice | torch.Tensor, CommonAttentionMetadata]:
    """What `requests` have left for vLLM's kernel: their query tokens but their own ones, as a batch.

    Nothing is copied from or to a GPU where the requests follow each other and have no own tokens.

    Args:
        batch: The whole batch.
        requests: ``[r]`` int64, ascending; on the host.
        cut: Of the batch.
        turn: Where their context lies, if not in the cache.
    """
    starts = batch.query_start_loc_cpu
    lens = starts.diff().long()[requests] - cut.own_lens[requests]
    first, last = int(requests[0]), int(requests[-1]) + 1
    changes: dict[str, Any] = {
        "num_reqs": len(requests),
        "num_actual_tokens": int(lens.sum()),
        "max_query_len": int(lens.max()),
    }
    tokens: slice | torch.Tensor
    if last - first == len(requests) and not cut.own_lens[first:last].any():
        start, end = int(starts[first]), int(starts[last])
        tokens = slice(start, end)
        known = batch.seq_lens_cpu_upper_bound
        changes |= {
            "query_start_loc": batch.query_start_loc[first : last + 1] - start,
            "query_start_loc_cpu": starts[first : last + 1] - start,
            "seq_lens": batch.seq_lens[first:last],
            "seq_lens_cpu_upper_bound": None if known is None else known[first:last],
            "block_table_tensor": batch.block_table_tensor[first:last],
            "slot_mapping": batch.slot_mapping[start:end],
        }
    else:
        tokens = joined(token_indices(starts.long()[requests], lens))
        changes |= {
            "query_start_loc": torch.nn.functional.pad(lens.cumsum(0), (1, 0)).int(),
            "seq_lens": (batch.seq_lens.long() - cut.own_lens)[requests].int(),
            "block_table_tensor": batch.block_table_tensor[requests],
        }
    if turn is not None:
        changes |= {"block_table_tensor": turn.block_table, "slot_mapping": turn.slots}
    return tokens, batch.replace(**changes)
