"""Which rows of a batch decode sparsely. Decided here, once per step, for all layers of a KV group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_quest.backend.counting import StepCounts
from vllm_quest.config import QuestConfig

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata


@dataclass(frozen=True)
class SparseRows:
    """The query tokens that select pages; a row each, also where one request decodes several tokens.

    Attributes:
        tokens: ``[R]`` int64, index of each row in the batch's query.
        block_table: ``[R, M]`` int32, trimmed to the longest context.
        seq_lens: ``[R]`` int32, tokens that the row may see, itself included.
        num_pages: ``[R]`` int32, pages in that context.
    """

    tokens: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    num_pages: torch.Tensor


@dataclass(frozen=True)
class BatchRows:
    """A batch, cut by request.

    Attributes:
        sparse: The rows that select pages; None where no row does.
        dense_requests: ``[n]`` int64, the other requests: prefill, and decode with a short context.
        counts: What the step adds to the counters.
    """

    sparse: SparseRows | None
    dense_requests: torch.Tensor
    counts: StepCounts


def split_rows(
    batch: CommonAttentionMetadata, config: QuestConfig, block_size: int, max_decode_query_len: int
) -> BatchRows:
    """Cuts a batch into rows that select pages and requests that attend densely.

    A request decodes when its prompt is done and it brings no more tokens than one speculative verification;
    a prompt's last chunk is prefill however short it is, so that outputs do not depend on chunking.

    Args:
        batch: vLLM's metadata, its tensors on the CPU.
        config: Says which contexts are long enough.
        block_size: Tokens per entry of the block table.
        max_decode_query_len: 1, plus the speculated tokens where the engine speculates.
    """
    starts = batch.query_start_loc_cpu.long()
    query_lens = starts.diff()
    seq_lens = batch.seq_lens.long()
    decodes = (query_lens > 0) & (query_lens <= max_decode_query_len)
    if batch.is_prefilling is not None:
        decodes &= ~batch.is_prefilling
    # A padded or empty request has no rows; it stays with the dense ones, where vLLM's kernel skips it.
    long_enough = seq_lens >= config.sparse_context
    sparse = decodes & long_enough if batch.causal is True else torch.zeros_like(decodes)
    decode_rows = int(query_lens[decodes].sum())
    rows = _rows(batch, sparse, starts, query_lens, config, block_size) if sparse.any() else None
    counts = StepCounts.of(
        config,
        prefill_tokens=int(query_lens.sum()) - decode_rows,
        decode_rows=decode_rows,
        sparse_lens=rows.seq_lens if rows else torch.empty(0),
    )
    return BatchRows(rows, (~sparse).nonzero().flatten(), counts)


def _rows(
    batch: CommonAttentionMetadata,
    requests: torch.Tensor,
    starts: torch.Tensor,
    query_lens: torch.Tensor,
    config: QuestConfig,
    block_size: int,
) -> SparseRows:
    request = requests.nonzero().flatten().repeat_interleave(query_lens[requests])
    tokens = token_indices(starts, query_lens, requests.nonzero().flatten())
    after = starts[request + 1] - 1 - tokens  # later tokens of the same request, which this one must not see
    seq_lens = batch.seq_lens.long()[request] - after
    blocks = -(-int(seq_lens.max()) // block_size)
    return SparseRows(
        tokens=tokens,
        block_table=batch.block_table_tensor[request, :blocks],
        seq_lens=seq_lens.int(),
        num_pages=(-(-seq_lens // config.page_size)).int(),
    )


def token_indices(starts: torch.Tensor, query_lens: torch.Tensor, requests: torch.Tensor) -> torch.Tensor:
    """Indices of all query tokens of `requests`, request by request, ``[sum of their query_lens]`` int64."""
    lens = query_lens[requests]
    ends = lens.cumsum(0)
    within = torch.arange(int(lens.sum())) - (ends - lens).repeat_interleave(lens)
    return starts[requests].repeat_interleave(lens) + within
