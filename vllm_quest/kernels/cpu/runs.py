"""How `store` cuts its tokens: into runs of one page, and for its threads into chunks of whole blocks."""

from __future__ import annotations

from numba import njit

from vllm_quest.kernels.cpu.memory import get


@njit(error_model="numpy")
def chunk_start(slots, tokens, block_size, chunk, chunks):
    """The first token of a chunk: no block has tokens in two chunks, so no two threads write one block."""
    token = tokens * chunk // chunks
    before = token - 1
    while before >= 0 and get(slots, before) < 0:
        before -= 1
    if before < 0:
        return token
    block = get(slots, before) // block_size
    while token < tokens and (get(slots, token) < 0 or get(slots, token) // block_size == block):
        token += 1
    return token


@njit(error_model="numpy")
def run_end(slots, token, last, page_size):
    """The token behind the run that begins with `token`: those of one page, and padding."""
    page = get(slots, token) // page_size
    while token < last and (get(slots, token) < 0 or get(slots, token) // page_size == page):
        token += 1
    return token
