"""What a step adds to the counters."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_quest.config import QuestConfig
from vllm_quest.metrics import CounterFile
from vllm_quest.page import PageLayout


@dataclass(frozen=True)
class StepCounts:
    """One step of one KV group, on one rank.

    Attributes:
        prefill_tokens: Query tokens of prefilling requests.
        decode_rows: Query tokens of decoding requests.
        sparse_rows: Those of them that select pages in a sparse layer.
        pages_in_context: Pages of the sparse rows' contexts.
        pages_read: Pages that the sparse rows read, per KV head.
        tokens_in_context: Tokens of the sparse rows' contexts.
        tokens_read: Tokens that the sparse rows read, per KV head.
    """

    prefill_tokens: int
    decode_rows: int
    sparse_rows: int
    pages_in_context: int
    pages_read: int
    tokens_in_context: int
    tokens_read: int

    @classmethod
    def of(
        cls, config: QuestConfig, prefill_tokens: int, decode_rows: int, sparse_lens: torch.Tensor
    ) -> StepCounts:
        """The counts of a step whose sparse rows see `sparse_lens`, ``[R]`` on the host, tokens each."""
        seq_lens = sparse_lens.long()
        num_pages = -(-seq_lens // config.page_size)
        pages_read = num_pages.clamp(max=config.budget_pages)
        unfilled = num_pages * config.page_size - seq_lens  # slots of the last page, which is always read
        return cls(
            prefill_tokens=prefill_tokens,
            decode_rows=decode_rows,
            sparse_rows=len(seq_lens),
            pages_in_context=int(num_pages.sum()),
            pages_read=int(pages_read.sum()),
            tokens_in_context=int(seq_lens.sum()),
            tokens_read=int((pages_read * config.page_size - unfilled).sum()),
        )

    def add_dense_layer(self, counters: CounterFile, reason: str, layers: int = 1) -> None:
        """Counts `layers` layers that were dense for `reason`, a key of `layers.DENSE_REASONS`."""
        counters.add("prefill_tokens_dense", layers * self.prefill_tokens)
        counters.add(f"decode_rows_dense_{reason}", layers * self.decode_rows)

    def add_sparse_layer(
        self, counters: CounterFile, num_kv_heads: int, layout: PageLayout, layers: int = 1
    ) -> None:
        """Counts `layers` layers whose sparse rows selected pages.

        Args:
            counters: The worker's.
            num_kv_heads: KV heads of this rank.
            layout: Says what is read of a cache.
            layers: How many such layers.
        """
        heads = layers * num_kv_heads
        counters.add("prefill_tokens_dense", layers * self.prefill_tokens)
        counters.add("decode_rows_dense_context", layers * (self.decode_rows - self.sparse_rows))
        if self.sparse_rows:
            counters.add("decode_rows_sparse", layers * self.sparse_rows)
            counters.add("pages_scored", heads * self.pages_in_context)
            counters.add("pages_read", heads * self.pages_read)
            read = layout.bytes_read(
                rows=self.sparse_rows,
                tokens=self.tokens_read,
                pages_read=self.pages_read,
                pages_scored=self.pages_in_context,
            )
            counters.add("bytes_read", heads * read)
            counters.add("bytes_dense", heads * self.tokens_in_context * layout.block.dense_token_bytes)
