"""The memory through which the programs of one launch exchange partial results."""

from dataclasses import dataclass

import torch
import triton

from vllm_quest.kernels.triton.launch import CHUNK, SPLIT_TOKENS, split_total

__all__ = ["Workspace", "attend_scratch", "longest_read", "select_scratch"]


def select_scratch(pairs: int, max_pages: int, budget_pages: int) -> int:
    """Elements for `pairs` (row, KV head) pairs: every chunk's candidates; 0 where there is one chunk."""
    chunks = triton.cdiv(max_pages, CHUNK)
    return 0 if chunks == 1 else pairs * 2 * chunks * min(budget_pages, CHUNK)


def longest_read(max_pages: int, budget_pages: int, page_size: int, sparse_context: int) -> int:
    """Tokens that one row of `attend_pages` reads at most, by its arguments."""
    return min(max_pages * page_size, max(budget_pages * page_size, sparse_context - 1))


def attend_scratch(pairs: int, group: int, head_size: int, most_tokens: int, device: torch.device) -> int:
    """Elements for `pairs` (row, KV head) pairs that read up to `most_tokens`: outputs and log-sum-exps."""
    return (
        split_total("attend", pairs, triton.cdiv(most_tokens, SPLIT_TOKENS), device) * group * (head_size + 1)
    )


@dataclass(frozen=True)
class Workspace:
    """Scratch memory and counters.

    One workspace serves all layers and operations on one stream, since its launches follow each other. Two
    streams need two.

    Attributes:
        scratch: ``[n]`` float32.
        arrivals: ``[rows * KV heads]`` int32, zero between launches.
    """

    scratch: torch.Tensor
    arrivals: torch.Tensor

    @classmethod
    def allocate(cls, elements: int, pairs: int, device: torch.device) -> "Workspace":
        """A workspace of `elements` 4-byte elements for `pairs` (row, KV head) pairs."""
        return cls(
            scratch=torch.empty(elements, dtype=torch.float32, device=device),
            arrivals=torch.zeros(pairs, dtype=torch.int32, device=device),
        )

    @classmethod
    def for_decode(
        cls,
        *,
        max_rows: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        max_pages: int,
        budget_pages: int,
        page_size: int,
        score_elements: int = 0,
        sparse_context: int = 0,
        device: torch.device,
    ) -> "Workspace":
        """What score, select and attend of up to `max_rows` rows need.

        Args:
            max_rows: Most query tokens of one decode step.
            num_heads: Query heads of this rank.
            num_kv_heads: KV heads of this rank.
            head_size: Channels per head.
            max_pages: Pages of the block table's width, M * P.
            budget_pages: Pages read per (row, KV head), K.
            page_size: Tokens per page.
            score_elements: What the scorer needs, as its `score_scratch` says.
            sparse_context: As for `attend_pages`.
            device: The GPU.
        """
        pairs, group = max_rows * num_kv_heads, num_heads // num_kv_heads
        most_tokens = longest_read(max_pages, budget_pages, page_size, sparse_context)
        elements = max(
            score_elements,
            select_scratch(pairs, max_pages, budget_pages),
            attend_scratch(pairs, group, head_size, most_tokens, device),
        )
        return cls.allocate(elements, pairs, device)

    def check(self, elements: int, pairs: int) -> None:
        """Raises ValueError where the workspace is too small."""
        if self.scratch.numel() < elements or self.arrivals.numel() < pairs:
            raise ValueError(
                f"workspace: {self.scratch.numel()} elements and {self.arrivals.numel()} counters; this "
                f"launch needs {elements} and {pairs}"
            )
