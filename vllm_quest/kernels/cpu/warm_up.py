"""`warm_up`: compiles what one configuration needs, so that no request waits for the compiler."""

from __future__ import annotations

import logging

import numba
import torch

from vllm_quest.kernels.cpu.attend import attend_pages
from vllm_quest.kernels.cpu.dequantize import dequantize_blocks
from vllm_quest.kernels.cpu.score import score_pages
from vllm_quest.kernels.cpu.select import select_pages
from vllm_quest.kernels.cpu.store import store
from vllm_quest.layout import Int4Keys, Int4Values, PageLayout

__all__ = ["warm_up"]

logger = logging.getLogger("vllm.plugins.quest")


def warm_up(
    layout: PageLayout,
    num_heads: int,
    num_kv_heads: int,
    group_reduce: str,
    value_threshold: float | None = None,
) -> None:
    """Runs the operations once on a cache of one block; warns where numba has fewer threads than torch.

    Args:
        layout: Of the cache.
        num_heads: Query heads, Hq.
        num_kv_heads: KV heads, H.
        group_reduce: As in the configuration.
        value_threshold: Likewise.
    """
    if torch.get_num_threads() > numba.config.NUMBA_NUM_THREADS:
        logger.warning(
            "NUMBA_NUM_THREADS is %d: QUEST, and with it vLLM's own CPU kernels, run on fewer than the %d "
            "threads that vLLM chose. Unset it, or import numba after vLLM.",
            numba.config.NUMBA_NUM_THREADS,
            torch.get_num_threads(),
        )
    shape = (1, num_kv_heads, layout.block_size, layout.content_size)
    views = layout.views(torch.zeros(shape, dtype=layout.cache_dtype))
    query = torch.zeros(1, num_heads, layout.head_size, dtype=layout.dtype)
    key = torch.zeros(1, num_kv_heads, layout.head_size, dtype=layout.dtype)
    block_table = torch.zeros(1, 1, dtype=torch.int32)
    one = torch.ones(1, dtype=torch.int32)
    store(key, key, views.key, views.value, views.bounds, torch.zeros(1, dtype=torch.int64))
    scores = score_pages(query, views.bounds, block_table, one, 1.0, group_reduce)
    pages = select_pages(scores, one, 1, 0, 1)
    attend_pages(
        query,
        views.key,
        views.value,
        block_table,
        one,
        pages,
        layout.page_size,
        1.0,
        value_threshold=value_threshold,
    )
    if isinstance(views.key, Int4Keys) and isinstance(views.value, Int4Values):
        plain = PageLayout(layout.block_size, layout.page_size, layout.head_size, True, layout.dtype)
        shape = (1, num_kv_heads, layout.block_size, plain.content_size)
        out = plain.views(torch.zeros(shape, dtype=layout.dtype))
        assert isinstance(out.key, torch.Tensor)
        assert isinstance(out.value, torch.Tensor)
        dequantize_blocks(views.key, views.value, torch.zeros_like(one), one, out.key, out.value)
