"""The operations of QUEST in Triton, for GPUs: names and arguments of `vllm_quest.kernels.reference`.

Each is one launch, reads context lengths on the device, and allocates nothing where the caller passes `out`
and `workspace`: a decode step can be captured in a CUDA graph.
"""

from vllm_quest.kernels.triton.attend import attend_pages
from vllm_quest.kernels.triton.dequantize import dequantize_blocks
from vllm_quest.kernels.triton.score import score_pages
from vllm_quest.kernels.triton.select import select_pages
from vllm_quest.kernels.triton.store import store
from vllm_quest.kernels.triton.workspace import Workspace

__all__ = ["Workspace", "attend_pages", "dequantize_blocks", "score_pages", "select_pages", "store"]
