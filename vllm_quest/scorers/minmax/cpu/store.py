"""Store, compiled, over ``auto``: scatters K and V of new tokens and recomputes the bounds of their pages."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numba import njit, prange

from vllm_quest.config import PAGE_SIZES
from vllm_quest.formats.auto import AutoCache
from vllm_quest.kernels.bounds import PageBounds
from vllm_quest.kernels.cpu.bounds import write_codes
from vllm_quest.kernels.cpu.elements import SIZE
from vllm_quest.kernels.cpu.launch import (
    CACHE_LINE,
    INSTRUCTIONS,
    KERNEL_OPTIONS,
    addresses_of,
    bound_addresses,
    check_bounds,
    check_caches,
    check_integers,
    check_new_tokens,
    chunks_for_balance,
    new_counter,
    use_torch_threads,
)
from vllm_quest.kernels.cpu.memory import (
    advance,
    copy,
    get,
    load,
    load_tile,
    next_item,
    pointer,
    prefetch,
    scatter,
    stack,
)
from vllm_quest.kernels.cpu.memory import store as store_tile
from vllm_quest.kernels.cpu.runs import chunk_start, run_end
from vllm_quest.kernels.cpu.simd import filled, first_lanes, max_of_rows, maximum, min_of_rows, minimum

__all__ = ["store"]

LANES = 16


@cache
def store_kernel(dtype: str, bounds_dtype: str, head_size: int, page_size: int, block_size: int):
    """The kernel of one configuration.

    A work item is (KV head, chunk of tokens). The bounds of a page are computed after the last token of a run
    that lies in it.
    """
    build = INSTRUCTIONS
    coded = bounds_dtype == "uint8"
    bounds_size = 2 * head_size
    lanes = min(LANES, page_size)
    line = CACHE_LINE // SIZE[dtype]

    @njit(**KERNEL_OPTIONS)
    def kernel(
        threads, counter, key, key_token, key_head, value, value_token, value_head, key_cache, key_block,
        key_block_head, value_cache, value_block, value_block_head, bounds, bounds_block, bounds_head,
        params, params_block, params_head, slot_mapping, tokens, kv_heads, chunks,
    ):  # fmt: skip
        build  # noqa: B018
        for _ in prange(threads):
            found = stack("float32", bounds_size)
            while True:
                item = next_item(pointer(counter, "int64"))
                head, chunk = item // chunks, item % chunks
                if head >= kv_heads:
                    break
                slots = pointer(slot_mapping, "int64")
                token = chunk_start(slots, tokens, block_size, chunk, chunks)
                last = chunk_start(slots, tokens, block_size, chunk + 1, chunks)
                while token < last:
                    slot = get(slots, token)
                    if slot < 0:
                        token += 1
                        continue
                    block, start = slot // block_size, slot % block_size // page_size * page_size
                    keys = advance(
                        pointer(key_cache, dtype), block * key_block + head * key_block_head + start
                    )
                    place = block * value_block + head * value_block_head + start * head_size
                    values = advance(pointer(value_cache, dtype), place)
                    for channel in range(head_size):
                        for part in range(0, page_size, line):
                            prefetch(advance(keys, channel * block_size + part))
                    written, end = 0, run_end(slots, token, last, page_size)
                    for i in range(token, end):
                        if get(slots, i) < 0:
                            continue
                        position = get(slots, i) % page_size
                        k = advance(pointer(key, dtype), i * key_token + head * key_head)
                        v = advance(pointer(value, dtype), i * value_token + head * value_head)
                        for channel in range(0, head_size, LANES):
                            copy(advance(v, channel), advance(values, position * head_size + channel), LANES)
                            target = advance(keys, channel * block_size + position)
                            scatter(advance(k, channel), target, block_size, LANES)
                        written = position + 1
                    token = end
                    for channel in range(0, head_size, lanes):
                        low = filled(np.float32(np.inf), lanes, 1, lanes)
                        high = filled(np.float32(-np.inf), lanes, 1, lanes)
                        for position in range(0, written, lanes):
                            source = advance(keys, channel * block_size + position)
                            part = load_tile(source, block_size, lanes, 1, lanes)
                            low = minimum(low, first_lanes(part, written - position, np.float32(np.inf)))
                            high = maximum(high, first_lanes(part, written - position, np.float32(-np.inf)))
                        store_tile(advance(found, channel), 0, min_of_rows(low))
                        store_tile(advance(found, head_size + channel), 0, max_of_rows(high))
                    page = start // page_size
                    place = block * bounds_block + head * bounds_head + page * bounds_size
                    page_bounds = advance(pointer(bounds, bounds_dtype), place)
                    if coded:
                        place = block * params_block + head * params_head + page * 2
                        pair = advance(pointer(params, "float32"), place)
                        write_codes(page_bounds, pair, head_size, found, found, False)
                    else:
                        for channel in range(0, bounds_size, LANES):
                            bound = load(advance(found, channel), LANES)
                            store_tile(advance(page_bounds, channel), 0, bound)

    return kernel


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: AutoCache,
    summary: PageBounds,
    slot_mapping: torch.Tensor,
) -> None:
    """Writes K and V of new tokens and the bounds of every page they touch (section 3.2, "page metadata").

    A request fills a page from its first slot on, so the bounds of a touched page are those of its keys from
    the first slot to the last one written here. Older content of the page never enters them.

    Args:
        key: ``[T, H, D]``, the cache's dtype; heads contiguous.
        value: ``[T, H, D]``, likewise.
        cache: K and V, ``[B, H, N, D]`` each; K in channel-major blocks, strides ``(.., .., 1, N)``, V in
            token-major ones, strides ``(.., .., D, 1)``; written.
        summary: kmin and kmax of each page, each ``[P, 2, D]`` contiguous; written.
        slot_mapping: ``[T]`` int64, ``block * N + position in the block``; -1 is padding and is skipped. The
            tokens of one block come together, those of one page with ascending slots.
    """
    key_cache, value_cache = cache
    dtype = check_caches(key_cache, value_cache)
    num_blocks, kv_heads, block_size, head_size = key_cache.shape
    tokens = len(slot_mapping)
    check_new_tokens(key, value, tokens, kv_heads, head_size, dtype)
    values = summary.values
    page_size = block_size // values.shape[2]
    bounds_dtype = check_bounds(summary, head_size)
    if (
        bounds_dtype not in (dtype, "uint8")
        or values.shape[:2] != (num_blocks, kv_heads)
        or page_size not in PAGE_SIZES
    ):
        raise ValueError(
            f"bounds: expected [{num_blocks}, {kv_heads}, P, 2, {head_size}] {dtype} or codes, with "
            f"pages of {PAGE_SIZES} tokens, got {tuple(values.shape)} {values.dtype}"
        )
    check_integers("slot_mapping", slot_mapping, torch.int64, tokens)
    kernel = store_kernel(dtype, bounds_dtype, head_size, page_size, block_size)
    threads, counter = use_torch_threads(), new_counter()
    chunks = chunks_for_balance(kv_heads, threads, max(1, tokens // block_size))
    kernel(
        threads, counter.ctypes.data, key.data_ptr(), key.stride(0), key.stride(1), value.data_ptr(),
        value.stride(0), value.stride(1), *addresses_of(key_cache, value_cache), *bound_addresses(summary),
        slot_mapping.data_ptr(), tokens, kv_heads, chunks,
    )  # fmt: skip
