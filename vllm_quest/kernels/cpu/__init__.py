"""The CPU as a device: selection, and what compiled kernels are written in.

`simd` is the instruction set that the kernels are written in, `launch` what their launchers share.
"""

import os

import torch

# numba counts the cores of the thread that imports it. In a worker of vLLM that is one: OpenMP has bound it.
# numba shares OpenMP with vLLM's kernels, and fewer threads for the one would be fewer for the other.
os.environ.setdefault("NUMBA_NUM_THREADS", str(max(torch.get_num_threads(), len(os.sched_getaffinity(0)))))

from vllm_quest.kernels.cpu.select import select_pages
from vllm_quest.kernels.cpu.warm_up import prepare

__all__ = ["prepare", "select_pages"]
