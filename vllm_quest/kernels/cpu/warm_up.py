"""Before the first step: compiles what one configuration needs, so that no request waits for the compiler."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numba
import torch

from vllm_quest.kernels.operations import Rows

if TYPE_CHECKING:
    from vllm_quest.config import QuestConfig
    from vllm_quest.kernels.operations import Operations, Shapes
    from vllm_quest.page import PageLayout

__all__ = ["prepare"]

logger = logging.getLogger("vllm.plugins.quest")


def prepare(
    operations: Operations, layout: PageLayout, config: QuestConfig, shapes: Shapes
) -> dict[str, Any]:
    """Runs the operations once on a cache of one block; warns where numba has fewer threads than torch.

    Returns:
        What the operations are given beside their arguments: nothing.
    """
    if torch.get_num_threads() > numba.config.NUMBA_NUM_THREADS:
        logger.warning(
            "NUMBA_NUM_THREADS is %d: QUEST, and with it vLLM's own CPU kernels, run on fewer than the %d "
            "threads that vLLM chose. Unset it, or import numba after vLLM.",
            numba.config.NUMBA_NUM_THREADS,
            torch.get_num_threads(),
        )
    block, heads = layout.block, shapes.num_kv_heads
    pages = layout.views(
        torch.zeros(1, heads, block.block_size, layout.content_size, dtype=layout.cache_dtype),
        shapes.parameters,
    )
    query = torch.zeros(1, shapes.num_heads, block.head_size, dtype=block.dtype)
    key = torch.zeros(1, heads, block.head_size, dtype=block.dtype)
    one = torch.ones(1, dtype=torch.int32)
    rows = Rows(block_table=torch.zeros(1, 1, dtype=torch.int32), seq_lens=one, num_pages=one)
    operations.store(key, key, pages, torch.zeros(1, dtype=torch.int64))
    page_indices = None
    if config.token_budget is not None:  # without a budget every layer reads everything
        page_indices = operations.select_pages(operations.score_pages(query, pages, rows, 1.0), rows)
    operations.attend_pages(query, pages, rows, page_indices, 1.0)
    if not layout.format.is_dense:
        out = torch.zeros(1, heads, block.block_size, 2 * block.head_size, dtype=block.dtype)
        operations.dequantize_blocks(pages, torch.zeros_like(one), one, *block.split(out))
    return {}
