"""How attention kernels of all formats are launched: splits, scratch memory, output."""

import math
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime.jit import JITFunction

from vllm_quest.kernels.triton.launch import SPLIT_TOKENS, Choice, check_group, dot_type, split_count
from vllm_quest.kernels.triton.structs import Contexts, Group, PerHead, Scratch, Selection
from vllm_quest.kernels.triton.workspace import Workspace, attend_scratch, longest_read

__all__ = ["Attention", "attend"]

LOG2E = 1.4426950408889634
EVERY_ROW = 2**31 - 1  # a `sparse_context` that no context reaches


class Attention(NamedTuple):
    """How attention reads a cache."""

    kernel: JITFunction
    cache: tuple  # pointers and strides
    shape: Any  # constants; has BLOCK_SIZE
    constants: dict[str, Any]  # what else it is specialized for
    num_kv_heads: int
    choice: Choice


def attend(
    attention: Attention,
    query: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    page_indices: torch.Tensor | None,
    page_size: int,
    scale: float,
    *,
    sparse_context: int = 0,
    value_threshold: float | None = None,
    out: torch.Tensor | None = None,
    workspace: Workspace | None = None,
) -> torch.Tensor:
    """Attention over the tokens of the selected pages only. One launch, the merge of the splits included.

    Args:
        attention: The kernel of a format, and the cache as that is given it.
        query: ``[R, Hq, D]``, contiguous in D; Hq / H at most 16.
        block_table: ``[R, M]`` int32; only entries of pages to read are read.
        seq_lens: ``[R]`` int32; the last page may be partly filled. 0 for the padding rows of a CUDA graph.
        page_indices: ``[R, H, K]`` int32, as `select_pages` returns it: K of the row's pages in ascending
            order, or all it has, the last one always among them. None: every row reads every page.
        page_size: Tokens per page, a power of two.
        scale: Factor of q . k.
        sparse_context: Rows of fewer tokens read every page, whatever `page_indices` holds.
        value_threshold: V rows are not loaded where no query head of the group has e^-value_threshold of the
            largest probability that its split has met so far; None loads every V row.
        out: ``[R, Hq, D]``, written.
        workspace: Holds at least `attend_scratch` elements.

    Returns:
        ``[R, Hq, D]`` in the query's dtype; accumulated in float32. Zeros where a row has no page to read.

    Raises:
        ValueError: A shape or stride that the kernel does not handle.
    """
    rows, num_heads, head_size = query.shape
    num_kv_heads = attention.num_kv_heads
    group = check_group(num_heads, num_kv_heads)
    if page_indices is None:  # its place is taken by what is not read
        page_indices, sparse_context = block_table[:, None], EVERY_ROW
    budget_pages = page_indices.shape[2]
    if query.stride(2) != 1 or block_table.stride(1) != 1 or page_indices.stride(2) != 1:
        raise ValueError("query, block_table, page_indices: the last dimension must be contiguous")
    if out is None:
        out = torch.empty_like(query)
    if out.shape != query.shape or out.stride(2) != 1:
        raise ValueError(f"out: {tuple(out.shape)}; needed: {tuple(query.shape)}, contiguous in D")

    pairs = rows * num_kv_heads
    max_pages = block_table.shape[1] * (attention.shape.BLOCK_SIZE // page_size)
    most_tokens = longest_read(max_pages, budget_pages, page_size, sparse_context)
    splits = split_count("attend", pairs, triton.cdiv(most_tokens, SPLIT_TOKENS), query.device)
    needed = attend_scratch(pairs, group, head_size, most_tokens, query.device)
    if workspace is None:
        workspace = Workspace.allocate(needed, pairs, query.device)
    workspace.check(needed, pairs)
    attention.kernel[(splits, num_kv_heads, rows)](
        PerHead.of(out),
        Scratch(workspace.scratch, workspace.arrivals),
        PerHead.of(query),
        attention.cache,
        Contexts.of(block_table, seq_lens),
        Selection.of(page_indices),
        scale * LOG2E,
        None if value_threshold is None else math.exp(-value_threshold),
        splits,
        sparse_context,
        shape=attention.shape,
        group=Group.of(group),
        TILE=attention.choice.tile,
        DOT=dot_type(query.dtype),
        **attention.constants,
        **attention.choice.options,
    )
    return out
