"""GPUs as a device: selection, and what Triton kernels share.

Each operation is one launch, reads context lengths on the device, and allocates nothing where the caller
passes `out` and `workspace`: a decode step can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_quest.config import NO_CONTEXT
from vllm_quest.kernels.triton.select import select_pages
from vllm_quest.kernels.triton.workspace import Workspace

if TYPE_CHECKING:
    from vllm_quest.config import QuestConfig
    from vllm_quest.kernels.operations import Operations, Shapes
    from vllm_quest.page import PageLayout

__all__ = ["Workspace", "prepare", "select_pages"]


def prepare(
    operations: Operations, layout: PageLayout, config: QuestConfig, shapes: Shapes
) -> dict[str, Any]:
    """Allocates the scratch memory of a step.

    Returns:
        What the operations are given beside their arguments: ``workspace``.
    """
    workspace = Workspace.for_decode(
        max_rows=shapes.max_rows,
        num_heads=shapes.num_heads,
        num_kv_heads=shapes.num_kv_heads,
        head_size=layout.block.head_size,
        max_pages=shapes.max_pages,
        budget_pages=config.budget_pages,
        page_size=config.page_size,
        score_elements=operations.score_elements(shapes),
        sparse_context=NO_CONTEXT if shapes.reads_everything else config.sparse_context,
        device=shapes.device,
    )
    return {"workspace": workspace}
