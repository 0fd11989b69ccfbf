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
    """The query tokens that our kernels attend to; a row each, also where a request decodes several tokens.

    Attributes:
        tokens: ``[R]`` int64, index of each row in the batch's query.
        block_table: ``[R, M]`` int32, trimmed to the longest context.
        seq_lens: ``[R]`` int32, tokens that the row may see, itself included.
        num_pages: ``[R]`` int32, pages in that context; 0 where the row reads all of them, and scoring and
            selection have nothing to do.
    """

    tokens: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    num_pages: torch.Tensor


@dataclass(frozen=True)
class BatchRows:
    """A batch, cut by query token.

    Attributes:
        sparse: The rows of our kernels; None where there are none.
        sparse_lens: ``[requests]`` int64, how many query tokens of each request those are, its last ones. The
            ones before are left to vLLM's kernel: prefill and, unless pages have 4 bits, short contexts.
        counts: What the step adds to the counters.
    """

    sparse: SparseRows | None
    sparse_lens: torch.Tensor
    counts: StepCounts


def split_rows(
    batch: CommonAttentionMetadata, config: QuestConfig, block_size: int, max_decode_query_len: int
) -> BatchRows:
    """Cuts a batch into rows of our kernels and tokens that vLLM's kernel attends to.

    A request decodes when its prompt is done and it brings no more tokens than one speculative verification;
    a prompt's last chunk is prefill however short it is, so that outputs do not depend on chunking. Only
    `decode_tail` makes the end of a prompt decode too; then every prompt comes in one step. vLLM's kernel
    cannot read 4-bit pages: then all decode rows are ours, and short contexts read all their pages.

    Args:
        batch: vLLM's metadata, its tensors on the CPU.
        config: Says which contexts are long enough.
        block_size: Tokens per entry of the block table.
        max_decode_query_len: 1, plus the speculated tokens where the engine speculates.
    """
    starts = batch.query_start_loc_cpu.long()
    query_lens = starts.diff()
    decodes = query_lens <= max_decode_query_len
    if batch.is_prefilling is not None:
        decodes &= ~batch.is_prefilling
    decode_lens = query_lens.where(decodes, query_lens.clamp(max=config.decode_tail))
    # Each token of a request sees one more than the token before it.
    shortest = 1 if config.kv_dtype == "int4" else config.sparse_context
    beyond = (batch.seq_lens.long() - shortest + 1).clamp(min=0)
    sparse_lens = beyond.minimum(decode_lens) if batch.causal is True else torch.zeros_like(decode_lens)
    rows = _rows(batch, sparse_lens, starts, config, block_size) if sparse_lens.any() else None
    counts = StepCounts.of(
        config,
        prefill_tokens=int((query_lens - decode_lens).sum()),
        decode_rows=int(decode_lens.sum()),
        sparse_lens=rows.seq_lens[rows.num_pages > 0] if rows else torch.empty(0),
    )
    return BatchRows(rows, sparse_lens, counts)


def _rows(
    batch: CommonAttentionMetadata,
    sparse_lens: torch.Tensor,
    starts: torch.Tensor,
    config: QuestConfig,
    block_size: int,
) -> SparseRows:
    request = torch.arange(len(sparse_lens)).repeat_interleave(sparse_lens)
    tokens = token_indices(starts[1:] - sparse_lens, sparse_lens)
    after = starts[request + 1] - 1 - tokens  # later tokens of the same request, which this one must not see
    seq_lens = batch.seq_lens.long()[request] - after
    blocks = -(-int(seq_lens.max()) // block_size)
    return SparseRows(
        tokens=tokens,
        block_table=batch.block_table_tensor[request, :blocks],
        seq_lens=seq_lens.int(),
        num_pages=(-(-seq_lens // config.page_size)).where(seq_lens >= config.sparse_context, 0).int(),
    )


def token_indices(firsts: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
    """Indices of `lens` query tokens from `firsts` on, request by request, ``[sum of lens]`` int64."""
    ends = lens.cumsum(0)
    within = torch.arange(int(lens.sum())) - (ends - lens).repeat_interleave(lens)
    return firsts.repeat_interleave(lens) + within
