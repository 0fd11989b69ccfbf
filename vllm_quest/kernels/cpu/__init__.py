"""QUEST's operations compiled for CPUs: the names and arguments of `vllm_quest.kernels.reference`.

`simd` is the instruction set that the kernels are written in, `launch` what their launchers share.
"""

from vllm_quest.kernels.cpu.attend import attend_pages
from vllm_quest.kernels.cpu.dequantize import dequantize_blocks
from vllm_quest.kernels.cpu.score import score_pages
from vllm_quest.kernels.cpu.select import select_pages
from vllm_quest.kernels.cpu.store import store
from vllm_quest.kernels.cpu.warm_up import warm_up

__all__ = ["attend_pages", "dequantize_blocks", "score_pages", "select_pages", "store", "warm_up"]
