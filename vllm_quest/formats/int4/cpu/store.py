"""`store` into int4 pages, compiled: `reference.store` has the rules and the reasons.

It does the reference's float32 operations in the reference's order, so that both write the same codes.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from numba import njit, prange

from vllm_quest.formats.int4 import Int4Cache, reference
from vllm_quest.formats.int4.cpu.checks import check_int4
from vllm_quest.formats.int4.cpu.nibbles import TAGS, has_residual, high_nibbles, low_nibbles, packed
from vllm_quest.kernels.cpu.bounds import (
    clamped,
    clear,
    read_bounds,
    widen,
    write_codes,
    write_rounded,
)
from vllm_quest.kernels.cpu.launch import (
    INSTRUCTIONS,
    KERNEL_OPTIONS,
    addresses_of,
    bound_addresses,
    check_bounds,
    check_integers,
    check_new_tokens,
    chunks_for_balance,
    new_counter,
    use_torch_threads,
)
from vllm_quest.kernels.cpu.memory import (
    advance,
    get,
    load_like,
    next_item,
    pointer,
    put,
    scatter,
    stack,
)
from vllm_quest.kernels.cpu.memory import store as store_tile
from vllm_quest.kernels.cpu.rounding import bfloat16_above, bfloat16_below, min_lane, nearest
from vllm_quest.kernels.cpu.runs import chunk_start, run_end
from vllm_quest.kernels.cpu.simd import (
    add,
    first_lanes,
    max_lane,
    maximum,
    minimum,
    multiply,
    splat_like,
    subtract,
    zeros,
)

__all__ = ["store"]

LANES = 16
STEPS = np.float32(reference.STEPS)
FINE = np.float32(reference.FINE)
LARGEST = np.float32(reference.LARGEST)
TINY = np.float32(reference.TINY)
NO_FRACTION = np.float32(reference.NO_FRACTION)


@njit(error_model="numpy")
def inverse(step):
    return np.float32(1) / step if step > TINY else np.float32(0)


@njit(error_model="numpy")
def older_key(code, residual, belongs, zero, step):
    """Keys from their codes, and from the residual where it is the page's."""
    if belongs:
        sixteenths = subtract(residual, splat_like(NO_FRACTION, code))
        code = add(code, multiply(sixteenths, splat_like(np.float32(1) / FINE, code)))
    return add(splat_like(zero, code), multiply(splat_like(step, code), code))


@njit(error_model="numpy")
def read_older(codes, residual, belongs, bounds, head_size, half, count, keys, like, lanes):
    """The first `count` keys of a page, and 0 behind them, to `keys`, ``[D, S]``."""
    for channel in range(head_size):
        zero = get(bounds, channel)
        step = get(bounds, head_size + channel) / STEPS - zero / STEPS
        for byte in range(0, half, lanes):
            code = load_like(advance(codes, channel * half + byte), like)
            both = load_like(advance(residual, channel * half + byte), like)
            low = older_key(low_nibbles(code), low_nibbles(both), belongs, zero, step)
            high = older_key(high_nibbles(code), high_nibbles(both), belongs, zero, step)
            target = advance(keys, channel * 2 * half + byte)
            store_tile(target, 0, first_lanes(low, count - byte, np.float32(0)))
            store_tile(advance(target, half), 0, first_lanes(high, count - half - byte, np.float32(0)))


@njit(error_model="numpy")
def fine_codes(elements, zero, fine_inverse):
    """8-bit codes, in sixteenths of a step."""
    steps = multiply(subtract(elements, splat_like(zero, elements)), splat_like(fine_inverse, elements))
    whole = clamped(nearest(steps), np.float32(0), STEPS * FINE)
    return add(whole, splat_like(NO_FRACTION, elements))


@njit(error_model="numpy")
def write_keys(codes, residual, owns_residual, page, bounds, head_size, half, keys, like, lanes):
    """Quantizes a page of keys, ``[D, S]``, with these bounds; the residual too, if it is now this page's."""
    for channel in range(head_size):
        zero = get(bounds, channel)
        step = get(bounds, head_size + channel) / STEPS - zero / STEPS
        fine_inverse = inverse(step) * FINE
        for byte in range(0, half, lanes):
            source = advance(keys, channel * 2 * half + byte)
            low = fine_codes(load_like(source, like), zero, fine_inverse)
            high = fine_codes(load_like(advance(source, half), like), zero, fine_inverse)
            code = packed(high_nibbles(low), high_nibbles(high))
            store_tile(advance(codes, channel * half + byte), 0, code)
            if owns_residual:
                both = packed(low_nibbles(low), low_nibbles(high))
                store_tile(advance(residual, channel * half + byte), 0, both)
        if owns_residual:
            last = advance(residual, channel * half + half - 1)
            put(last, 0, np.float32(int(get(last, 0)) % TAGS + page % TAGS * TAGS))


@njit(error_model="numpy")
def keep_residual(residual, count, head_size, half, like):
    """Keeps V's residual, ``[S / 2, D]``, of the first `count` tokens of a page; none for the others."""
    none = splat_like(NO_FRACTION, like)
    for token in range(max(0, count - half), half):
        for channel in range(0, head_size, LANES):
            target = advance(residual, token * head_size + channel)
            low = low_nibbles(load_like(target, like)) if token < count else none
            store_tile(target, 0, packed(low, none))


@njit(error_model="numpy")
def put_nibbles(target, nibbles, is_high):
    """Replaces one half of the bytes at `target`."""
    both = load_like(target, nibbles)
    both = packed(low_nibbles(both), nibbles) if is_high else packed(nibbles, high_nibbles(both))
    store_tile(target, 0, both)


@njit(error_model="numpy")
def write_value(value, codes, residual, owns_residual, params, is_high, groups, group_size, like, lanes):
    """Quantizes one token of V: its halves of the bytes at `codes` and `residual`, zero points, scales."""
    for group in range(groups):
        first = group * group_size
        low, high = splat_like(LARGEST, like), splat_like(-LARGEST, like)
        for channel in range(first, first + group_size, lanes):
            v = clamped(load_like(advance(value, channel), like), -LARGEST, LARGEST)
            low, high = minimum(low, v), maximum(high, v)
        zero = max_lane(bfloat16_below(splat_like(min_lane(low), like)))
        scale = max_lane(bfloat16_above(splat_like(max_lane(high) / STEPS - zero / STEPS, like)))
        put(params, 2 * group, zero)
        put(params, 2 * group + 1, scale)
        for channel in range(first, first + group_size, lanes):
            v = clamped(load_like(advance(value, channel), like), -LARGEST, LARGEST)
            fine = fine_codes(v, zero, inverse(scale) * FINE)
            put_nibbles(advance(codes, channel), high_nibbles(fine), is_high)
            if owns_residual:
                put_nibbles(advance(residual, channel), low_nibbles(fine), is_high)


@cache
def store_int4_kernel(
    dtype: str, bounds_dtype: str, head_size: int, groups: int, page_size: int, block_size: int
):
    """The kernel of one configuration. A work item is (KV head, chunk of tokens)."""
    build = INSTRUCTIONS
    coded = bounds_dtype == "uint8"
    bounds_size = 2 * head_size
    keys_size = head_size * page_size
    half = page_size // 2
    lanes = min(LANES, half)
    group_size = head_size // groups
    value_lanes = math.gcd(LANES, group_size)

    @njit(**KERNEL_OPTIONS)
    def kernel(
        threads, counter, key, key_token, key_head, value, value_token, value_head, key_codes, key_block,
        key_block_head, key_residual, key_residual_block, key_residual_head, value_codes, value_block,
        value_block_head, value_params, value_params_block, value_params_head, value_residual,
        value_residual_block, value_residual_head, bounds, bounds_block, bounds_head, params, params_block,
        params_head, slot_mapping, tokens, kv_heads, chunks,
    ):  # fmt: skip
        build  # noqa: B018
        for _ in prange(threads):
            keys, row = stack("float32", keys_size), stack("float32", head_size)
            found, old = stack("float32", bounds_size), stack("float32", bounds_size)
            like, value_like, row_like = zeros(1, 1, lanes), zeros(1, 1, value_lanes), zeros(1, 1, LANES)
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
                    block, page, first = slot // block_size, slot % block_size // page_size, slot % page_size
                    place = block * key_block + head * key_block_head + page * half * head_size
                    codes = advance(pointer(key_codes, "uint8"), place)
                    place = block * key_residual_block + head * key_residual_head
                    residual_of_k = advance(pointer(key_residual, "uint8"), place)
                    place = block * value_block + head * value_block_head + page * half * head_size
                    values = advance(pointer(value_codes, "uint8"), place)
                    place = block * value_params_block + head * value_params_head
                    pairs = advance(pointer(value_params, "bfloat16"), place + page * page_size * groups * 2)
                    place = block * value_residual_block + head * value_residual_head
                    residual_of_v = advance(pointer(value_residual, "uint8"), place)
                    place = block * bounds_block + head * bounds_head + page * bounds_size
                    page_bounds = advance(pointer(bounds, bounds_dtype), place)
                    place = block * params_block + head * params_head + page * 2
                    pair = advance(pointer(params, "float32"), place)
                    belongs = first > 0 and has_residual(residual_of_k, half, page)
                    if first > 0:
                        read_bounds(page_bounds, pair, coded, head_size, old)
                        read_older(
                            codes, residual_of_k, belongs, old, head_size, half, first, keys, like, lanes
                        )
                    else:
                        for i in range(0, keys_size, LANES):
                            store_tile(advance(keys, i), 0, zeros(1, 1, LANES))
                    clear(found, head_size)
                    end = run_end(slots, token, last, page_size)
                    owns = end >= last or get(slots, end) // block_size != block
                    if owns:
                        keep_residual(residual_of_v, first if belongs else 0, head_size, half, row_like)
                    for i in range(token, end):
                        if get(slots, i) < 0:
                            continue
                        position = get(slots, i) % page_size
                        k = advance(pointer(key, dtype), i * key_token + head * key_head)
                        for channel in range(0, head_size, LANES):
                            part = load_like(advance(k, channel), row_like)
                            store_tile(advance(row, channel), 0, clamped(part, -LARGEST, LARGEST))
                            target = advance(keys, channel * page_size + position)
                            scatter(advance(row, channel), target, page_size, LANES)
                        widen(found, row, row, head_size)
                        v = advance(pointer(value, dtype), i * value_token + head * value_head)
                        row_of_v = position % half * head_size
                        params_of_v = advance(pairs, position * groups * 2)
                        write_value(
                            v, advance(values, row_of_v), advance(residual_of_v, row_of_v), owns, params_of_v,
                            position >= half, groups, group_size, value_like, value_lanes,
                        )  # fmt: skip
                    token = end
                    if first > 0:
                        widen(found, old, advance(old, head_size), head_size)
                    if coded:
                        write_codes(page_bounds, pair, head_size, found, old, first > 0)
                    else:
                        write_rounded(page_bounds, head_size, found)
                    read_bounds(page_bounds, pair, coded, head_size, found)
                    write_keys(codes, residual_of_k, owns, page, found, head_size, half, keys, like, lanes)

    return kernel


def store(key: torch.Tensor, value: torch.Tensor, cache: Int4Cache, slot_mapping: torch.Tensor) -> None:
    """Quantizes K and V of new tokens into their pages, and widens the pages' bounds.

    Args:
        key: ``[T, H, D]``, the model's dtype; heads contiguous.
        value: ``[T, H, D]``, likewise.
        cache: Codes of K in channel-major pages, those of V in token-major ones; written.
        slot_mapping: ``[T]`` int64, ``block * N + position in the block``; -1 is padding and is skipped. The
            tokens of one block come together, those of one page with ascending slots.
    """
    key_cache, value_cache = cache
    _, kv_heads, _, half, head_size = check_int4(key_cache, value_cache)
    bounds_dtype = check_bounds(key_cache.bounds, head_size)
    if bounds_dtype not in ("bfloat16", "uint8"):
        raise ValueError(f"bounds: expected bfloat16 or codes, got {bounds_dtype}")
    tokens = len(slot_mapping)
    dtype = check_new_tokens(key, value, tokens, kv_heads, head_size)
    check_integers("slot_mapping", slot_mapping, torch.int64, tokens)
    block_size, groups = value_cache.params.shape[2:4]
    kernel = store_int4_kernel(dtype, bounds_dtype, head_size, groups, 2 * half, block_size)
    threads, counter = use_torch_threads(), new_counter()
    chunks = chunks_for_balance(kv_heads, threads, max(1, tokens // block_size))
    kernel(
        threads, counter.ctypes.data, key.data_ptr(), key.stride(0), key.stride(1), value.data_ptr(),
        value.stride(0), value.stride(1),
        *addresses_of(key_cache.codes, key_cache.residual, *value_cache),
        *bound_addresses(key_cache.bounds), slot_mapping.data_ptr(), tokens, kv_heads, chunks,
    )  # fmt: skip
