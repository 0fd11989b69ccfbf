"""4-bit K and V, compiled for CPUs."""

from vllm_quest.formats.int4.cpu.attend import attend_pages
from vllm_quest.formats.int4.cpu.dequantize import dequantize_blocks
from vllm_quest.formats.int4.cpu.store import store

__all__ = ["attend_pages", "dequantize_blocks", "store"]
