"""`store`, compiled: scatters K and V of new tokens and recomputes the bounds of every page they touch."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numba import njit, prange

from vllm_quest.kernels.cpu.launch import (
    INSTRUCTIONS,
    KERNEL_OPTIONS,
    check_key_cache,
    check_rows,
    chunks_for_balance,
    new_counter,
    require,
    use_torch_threads,
)
from vllm_quest.kernels.cpu.memory import advance, copy, get, load, next_item, pointer, put, scatter
from vllm_quest.kernels.cpu.simd import first_lanes, max_lane, maximum, min_lane, minimum, splat

__all__ = ["store"]

LANES = 16


@cache
def store_kernel(dtype: str, head_size: int, page_size: int, block_size: int):
    """The kernel of one configuration.

    A work item is (KV head, range of channels). It walks all tokens, so that no two threads write the same
    page's bounds, and the bounds are computed after the last token of a run that lies in one page.
    """
    build = INSTRUCTIONS
    token_lanes = min(LANES, page_size)
    vectors = head_size // LANES

    @njit(**KERNEL_OPTIONS)
    def kernel(
        threads, counter, key, key_token, key_head, value, value_token, value_head, key_cache, key_block,
        key_block_head, value_cache, value_block, value_block_head, bounds, bounds_block, bounds_head,
        slot_mapping, tokens, kv_heads, chunks,
    ):  # fmt: skip
        build  # noqa: B018
        for _ in prange(threads):
            while True:
                item = next_item(pointer(counter, "int64"))
                head, chunk = item // chunks, item % chunks
                if head >= kv_heads:
                    break
                first, last = vectors * chunk // chunks * LANES, vectors * (chunk + 1) // chunks * LANES
                slots = pointer(slot_mapping, "int64")
                for token in range(tokens):
                    slot = get(slots, token)
                    if slot < 0:
                        continue
                    block, position = slot // block_size, slot % block_size
                    k = advance(pointer(key, dtype), token * key_token + head * key_head)
                    v = advance(pointer(value, dtype), token * value_token + head * value_head)
                    keys = advance(pointer(key_cache, dtype), block * key_block + head * key_block_head)
                    place = block * value_block + head * value_block_head + position * head_size
                    values = advance(pointer(value_cache, dtype), place)
                    for channel in range(first, last, LANES):
                        copy(advance(v, channel), advance(values, channel), LANES)
                        target = advance(keys, channel * block_size + position)
                        scatter(advance(k, channel), target, block_size, LANES)
                    if token + 1 < tokens and get(slots, token + 1) // page_size == slot // page_size:
                        continue
                    written = position % page_size + 1
                    page_keys = advance(keys, position - position % page_size)
                    place = block * bounds_block + head * bounds_head + position // page_size * 2 * head_size
                    page_bounds = advance(pointer(bounds, dtype), place)
                    for channel in range(first, last):
                        low, high = (
                            splat(np.float32(np.inf), token_lanes),
                            splat(np.float32(-np.inf), token_lanes),
                        )
                        for start in range(0, written, token_lanes):
                            part = load(advance(page_keys, channel * block_size + start), token_lanes)
                            seen = written - start
                            low = minimum(low, first_lanes(part, seen, np.float32(np.inf)))
                            high = maximum(high, first_lanes(part, seen, np.float32(-np.inf)))
                        put(page_bounds, channel, min_lane(low))
                        put(page_bounds, head_size + channel, max_lane(high))

    return kernel


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    bounds: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Writes K and V of new tokens and the bounds of every page they touch (section 3.2, "page metadata").

    A request fills a page from its first slot on, so the bounds of a touched page are those of its keys from
    the first slot to the last one written here. Older content of the page never enters them.

    Args:
        key: ``[T, H, D]``, the cache's dtype, each head contiguous.
        value: ``[T, H, D]``, likewise.
        key_cache: ``[B, H, N, D]``, channel-major blocks: strides ``(.., .., 1, N)``; written.
        value_cache: ``[B, H, N, D]``, token-major blocks: strides ``(.., .., D, 1)``; written.
        bounds: ``[B, H, P, 2, D]``, kmin and kmax of each page, each ``[P, 2, D]`` contiguous; written.
        slot_mapping: ``[T]`` int64, ``block * N + position in the block``; -1 is padding and is skipped. The
            tokens of one page come with ascending slots.
    """
    dtype = check_key_cache(key_cache, value_cache)
    _, kv_heads, block_size, head_size = key_cache.shape
    tokens = len(slot_mapping)
    pages_per_block = bounds.shape[2]
    page_size = block_size // pages_per_block
    for name, tensor in (("key", key), ("value", value)):
        require(tensor.dtype == key_cache.dtype, name, f"expected {key_cache.dtype}, got {tensor.dtype}")
        require(
            len(tensor) >= tokens and tensor.shape[1:] == (kv_heads, head_size) and tensor.stride(2) == 1,
            name,
            f"expected [{tokens}, {kv_heads}, {head_size}] with contiguous heads, got {tuple(tensor.shape)} "
            f"with strides {tensor.stride()}",
        )
    require(bounds.dtype == key_cache.dtype, "bounds", f"expected {key_cache.dtype}, got {bounds.dtype}")
    require(
        bounds.shape == (*key_cache.shape[:2], pages_per_block, 2, head_size)
        and bounds.stride()[2:] == (2 * head_size, head_size, 1)
        and page_size in (8, 16, 32, 64),
        "bounds",
        f"expected [B, H, P, 2, {head_size}] with contiguous [P, 2, D] and pages of 8, 16, 32 or 64 tokens, "
        f"got {tuple(bounds.shape)} with strides {bounds.stride()}",
    )
    check_rows("slot_mapping", slot_mapping, torch.int64, tokens)
    kernel = store_kernel(dtype, head_size, page_size, block_size)
    threads, counter = use_torch_threads(), new_counter()
    chunks = chunks_for_balance(kv_heads, threads, head_size // LANES)
    kernel(
        threads, counter.ctypes.data, key.data_ptr(), key.stride(0), key.stride(1), value.data_ptr(),
        value.stride(0), value.stride(1), key_cache.data_ptr(), key_cache.stride(0), key_cache.stride(1),
        value_cache.data_ptr(), value_cache.stride(0), value_cache.stride(1), bounds.data_ptr(),
        bounds.stride(0), bounds.stride(1), slot_mapping.data_ptr(), tokens, kv_heads, chunks,
    )  # fmt: skip
