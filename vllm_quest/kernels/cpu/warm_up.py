"""`warm_up`: compiles what one configuration needs, so that no request waits for the compiler."""

from __future__ import annotations

import torch

from vllm_quest.kernels.cpu.attend import attend_pages
from vllm_quest.kernels.cpu.score import score_pages
from vllm_quest.kernels.cpu.select import select_pages
from vllm_quest.kernels.cpu.store import store
from vllm_quest.layout import PageLayout

__all__ = ["warm_up"]


def warm_up(
    head_size: int,
    num_heads: int,
    num_kv_heads: int,
    page_size: int,
    block_size: int,
    dtype: torch.dtype,
    group_reduce: str,
) -> None:
    """Runs the four operations once on a cache of one block.

    Args:
        head_size: D.
        num_heads: Query heads, Hq.
        num_kv_heads: KV heads, H.
        page_size: Tokens per page.
        block_size: Tokens per block, N.
        dtype: Of the model and its cache.
        group_reduce: As in the configuration.
    """
    layout = PageLayout(block_size, page_size, head_size, for_cpu=True, dtype=dtype)
    views = layout.views(torch.zeros(1, num_kv_heads, block_size, layout.content_size, dtype=dtype))
    query = torch.zeros(1, num_heads, head_size, dtype=dtype)
    key = torch.zeros(1, num_kv_heads, head_size, dtype=dtype)
    block_table = torch.zeros(1, 1, dtype=torch.int32)
    one = torch.ones(1, dtype=torch.int32)
    store(key, key, views.key, views.value, views.bounds, torch.zeros(1, dtype=torch.int64))
    scores = score_pages(query, views.bounds, block_table, one, 1.0, group_reduce)
    pages = select_pages(scores, one, 1, 0, 1)
    attend_pages(query, views.key, views.value, block_table, one, pages, page_size, 1.0)
