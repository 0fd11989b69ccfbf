"""The operations, their kernels executed as PTX: each case returns what came out and what the reference says.

`formats` are arguments of `PagedCache`.
"""

from __future__ import annotations

import torch

from tests.kernels.cache import PagedCache
from tools.ptx.launch import execute

Pair = tuple[torch.Tensor, torch.Tensor]
BLOCK_SIZE = 64
LENGTHS = [209, 1, 17]  # where rows read every page, the first one has two splits of attention


def new_cache(formats: dict) -> PagedCache:
    cache = PagedCache("triton", num_blocks=12, block_size=BLOCK_SIZE, **formats)
    cache.kernels.where = torch.device("cpu")  # where PTX is executed, also beside a GPU
    return cache


def kernel_of(operation: str, formats: dict) -> str:
    return f"{operation}_int4" if formats.get("kv_dtype") == "int4" else operation


def rows_of(cache: PagedCache, group: int) -> tuple[torch.Tensor, ...]:
    """A query, and the rows of LENGTHS: block_table, seq_lens, num_pages. Their pages go on after a step."""
    requests = [cache.new_request() for _ in LENGTHS]
    halves = {request: length // 2 for request, length in zip(requests, LENGTHS, strict=True)}
    cache.append(halves, padding=2, store=cache.reference.store)
    rest = {request: length - halves[request] for request, length in zip(requests, LENGTHS, strict=True)}
    cache.append(rest, store=cache.reference.store)
    return cache.random(len(LENGTHS), group), *cache.rows(requests)


def store(formats: dict, padding: int = 1) -> list[Pair]:
    """The bytes that each of three steps writes, with padding tokens."""
    cache, found = new_cache(formats), []

    def store(key, value, slots) -> None:
        before = cache.cache.clone()
        cache.reference.store(key, value, slots)
        expected = cache.cache.clone()
        cache.cache.copy_(before)
        execute(kernel_of("store", formats), lambda: cache.kernels.store(key, value, slots))
        before, expected, actual = (part.view(torch.uint8) for part in (before, expected, cache.cache))
        written = (actual != before) | (expected != before)
        found.append((actual[written], expected[written]))

    first, second = cache.new_request(), cache.new_request()
    cache.append({first: 21, second: 5}, padding=padding, store=store)
    cache.append({first: 1, second: 14}, padding=padding, store=store)  # pages continue, one into the next
    cache.reject(second, 3)
    cache.append({second: 2, first: 1}, padding=padding, store=store)
    return found


def score(formats: dict, group: int, group_reduce: str) -> Pair:
    """Page scores as an A100 computes them (an H100 uses `wgmma`); -inf behind a row's pages."""
    cache = new_cache(formats)
    query, table, _, num_pages = rows_of(cache, group)
    arguments = (query, table, num_pages, 0.3, group_reduce)
    expected = cache.reference.score_pages(*arguments)
    actual = torch.full_like(expected, -torch.inf)
    execute("score", lambda: cache.kernels.score_pages(*arguments, out=actual), target="sm_80")
    return actual, expected


def select(scores: torch.Tensor, num_pages: list[int], budget: int) -> Pair:
    cache = new_cache({})
    arguments = (scores, torch.tensor(num_pages, dtype=torch.int32), budget, 1, 2)
    expected = cache.reference.select_pages(*arguments)
    actual = torch.full_like(expected, -7)
    execute("select", lambda: cache.kernels.select_pages(*arguments, out=actual))
    return actual, expected


def attend(formats: dict, group: int, budget: int | None) -> Pair:
    """Attention over pages selected by their scores, or over all of them."""
    cache = new_cache(formats)
    query, table, seq_lens, num_pages = rows_of(cache, group)
    scale, indices = cache.layout.block.head_size**-0.5, None
    if budget is not None:
        scores = cache.reference.score_pages(query, table, num_pages, scale)
        indices = cache.reference.select_pages(scores, num_pages, budget, 1, 2)
    arguments = (query, table, seq_lens, indices, scale)
    actual = torch.full_like(query, torch.nan)
    execute(kernel_of("attend", formats), lambda: cache.kernels.attend_pages(*arguments, out=actual))
    return actual, cache.reference.attend_pages(*arguments)


def dequantize(formats: dict) -> Pair:
    """A whole block, one whose last page has a residual, and one of which nothing is wanted."""
    cache = new_cache(formats)
    request = cache.new_request()
    for tokens in (100, 5):
        cache.append({request: tokens}, store=cache.reference.store)
    blocks = torch.tensor([*cache.requests[request].blocks, 0], dtype=torch.int32)
    wanted = torch.tensor([BLOCK_SIZE, 105 - BLOCK_SIZE, 0], dtype=torch.int32)
    found = []
    execute("dequantize", lambda: found.append(cache.kernels.dequantize_blocks(blocks, wanted)))
    expected = cache.reference.dequantize_blocks(blocks, wanted)
    return torch.cat(found[0], -1), torch.cat(expected, -1)
