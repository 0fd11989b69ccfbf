"""The operations, their kernels executed as PTX: each case returns what came out and what the reference says.

`formats` are arguments of `PagedCache`.
"""

from __future__ import annotations

from importlib import import_module
from unittest import mock

import torch

from tests.kernels.by_device import reference, triton
from tests.kernels.cache import PagedCache
from tests.ptx.launch import execute

Pair = tuple[torch.Tensor, torch.Tensor]
BLOCK_SIZE = 64
LENGTHS = [209, 1, 17]  # where rows read every page, the first one has two splits of attention


def new_cache(formats: dict) -> PagedCache:
    return PagedCache(num_blocks=12, block_size=BLOCK_SIZE, for_cpu=False, **formats)


def kernel_of(operation: str, formats: dict) -> str:
    return f"{operation}_int4" if formats.get("kv_dtype") == "int4" else operation


def rows_of(cache: PagedCache, group: int) -> tuple[torch.Tensor, ...]:
    """A query, and the rows of LENGTHS: block_table, seq_lens, num_pages. Their pages go on after a step."""
    requests = [cache.new_request() for _ in LENGTHS]
    halves = {request: length // 2 for request, length in zip(requests, LENGTHS, strict=True)}
    cache.append(reference.store, halves, padding=2)
    cache.append(reference.store, {r: n - halves[r] for r, n in zip(requests, LENGTHS, strict=True)})
    shape = (len(LENGTHS), cache.cache.shape[1] * group, cache.layout.block.head_size)
    query = torch.from_numpy(cache.rng.standard_normal(shape)).to(cache.layout.block.dtype)
    return query, *cache.rows(requests)


def store(formats: dict, spread: int = 512) -> list[Pair]:
    """The bytes that each of three steps writes; 4-bit pages by programs of one token, up to `spread`."""
    cache, found = new_cache(formats), []

    def store(key, value, pages, slot_mapping) -> None:
        before, expected = cache.cache.clone(), cache.cache.clone()
        views = cache.layout.views(expected)
        reference.store(key, value, views, slot_mapping)
        arguments = (key, value, pages, slot_mapping)
        execute(kernel_of("store", formats), lambda: triton.store(*arguments))
        before, expected, actual = (part.view(torch.uint8) for part in (before, expected, cache.cache))
        written = (actual != before) | (expected != before)
        found.append((actual[written], expected[written]))

    first, second = cache.new_request(), cache.new_request()
    with mock.patch.object(import_module("vllm_quest.formats.int4.triton.store"), "SPREAD_TOKENS", spread):
        cache.append(store, {first: 21, second: 5}, padding=1)
        cache.append(store, {first: 1, second: 14})  # the pages go on, one of them into the next
        cache.reject(second, 3)
        cache.append(store, {second: 2, first: 1})
    return found


def score(formats: dict, group: int, group_reduce: str) -> Pair:
    """Page scores as an A100 computes them (an H100 uses `wgmma`); -inf behind a row's pages."""
    cache = new_cache(formats)
    query, table, _, num_pages = rows_of(cache, group)
    arguments = (query, cache.pages.summary, table, num_pages, 0.3, group_reduce)
    expected = reference.score_pages(*arguments)
    actual = torch.full_like(expected, -torch.inf)
    execute("score", lambda: triton.score_pages(*arguments, out=actual), target="sm_80")
    return actual, expected


def select(scores: torch.Tensor, num_pages: list[int], budget: int) -> Pair:
    arguments = (scores, torch.tensor(num_pages, dtype=torch.int32), budget, 1, 2)
    expected = reference.select_pages(*arguments)
    actual = torch.full_like(expected, -7)
    execute("select", lambda: triton.select_pages(*arguments, out=actual))
    return actual, expected


def attend(formats: dict, group: int, budget: int | None) -> Pair:
    """Attention over pages selected by their scores, or over all of them."""
    cache = new_cache(formats)
    query, table, seq_lens, num_pages = rows_of(cache, group)
    pages, page_size, scale = cache.pages, cache.layout.block.page_size, cache.layout.block.head_size**-0.5
    indices = None
    if budget is not None:
        scores = reference.score_pages(query, pages.summary, table, num_pages, scale, "max")
        indices = reference.select_pages(scores, num_pages, budget, 1, 2)
    arguments = (query, pages.cache, table, seq_lens, indices, page_size, scale)
    actual = torch.full_like(query, torch.nan)
    execute(kernel_of("attend", formats), lambda: triton.attend_pages(*arguments, out=actual))
    return actual, reference.attend_pages(*arguments)


def dequantize(formats: dict) -> Pair:
    """A whole block, one whose last page has a residual, and one of which nothing is wanted."""
    cache = new_cache(formats)
    request = cache.new_request()
    cache.append(reference.store, {request: 100})
    cache.append(reference.store, {request: 5})
    blocks = torch.tensor([*cache.requests[request].blocks, 0], dtype=torch.int32)
    wanted = torch.tensor([BLOCK_SIZE, 105 - BLOCK_SIZE, 0], dtype=torch.int32)
    shape = (len(blocks), cache.cache.shape[1], BLOCK_SIZE, 2 * cache.layout.block.head_size)
    actual, expected = (torch.full(shape, torch.nan, dtype=cache.layout.block.dtype) for _ in range(2))
    arguments = (cache.pages.cache, blocks, wanted)
    execute("dequantize", lambda: triton.dequantize_blocks(*arguments, *actual.chunk(2, -1)))
    reference.dequantize_blocks(*arguments, *expected.chunk(2, -1))
    return actual, expected
