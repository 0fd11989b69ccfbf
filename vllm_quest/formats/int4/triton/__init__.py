"""4-bit K and V in Triton."""

from vllm_quest.formats.int4.triton.attend import attend_pages
from vllm_quest.formats.int4.triton.dequantize import dequantize_blocks
from vllm_quest.formats.int4.triton.store import store

__all__ = ["attend_pages", "dequantize_blocks", "store"]
