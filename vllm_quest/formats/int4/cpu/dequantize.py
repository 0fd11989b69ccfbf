"""`dequantize_blocks`, compiled: int4 pages in the model's dtype, as dense attention reads them."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from numba import njit, prange

from vllm_quest.formats.int4 import Int4Cache, reference
from vllm_quest.formats.int4.cpu.checks import check_int4
from vllm_quest.formats.int4.cpu.nibbles import high_nibbles, low_nibbles
from vllm_quest.kernels.cpu.bounds import read_bounds
from vllm_quest.kernels.cpu.launch import (
    INSTRUCTIONS,
    KERNEL_OPTIONS,
    LARGEST,
    addresses_of,
    bound_addresses,
    check_bounds,
    check_caches,
    check_integers,
    new_counter,
    use_torch_threads,
)
from vllm_quest.kernels.cpu.memory import advance, get, load_like, next_item, pointer, stack, store
from vllm_quest.kernels.cpu.rounding import limited
from vllm_quest.kernels.cpu.simd import add, first_lanes, multiply, splat_like, zeros

__all__ = ["dequantize_blocks"]

LANES = 16
STEPS = np.float32(reference.STEPS)


@njit(error_model="numpy")
def real(code, zero, step, largest):
    """What codes stand for, at most the largest number of the model's dtype."""
    return limited(add(splat_like(zero, code), multiply(splat_like(step, code), code)), largest)


@njit(error_model="numpy")
def read_keys(codes, bounds, head_size, half, count, out, block_size, largest, like, lanes):
    """The first `count` keys of a page, and 0 behind them, to channel-major `out`."""
    for channel in range(head_size):
        zero = get(bounds, channel)
        step = get(bounds, head_size + channel) / STEPS - zero / STEPS
        for byte in range(0, half, lanes):
            code = load_like(advance(codes, channel * half + byte), like)
            low, high = (
                real(low_nibbles(code), zero, step, largest),
                real(high_nibbles(code), zero, step, largest),
            )
            target = advance(out, channel * block_size + byte)
            store(target, 0, first_lanes(low, count - byte, np.float32(0)))
            store(advance(target, half), 0, first_lanes(high, count - half - byte, np.float32(0)))


@njit(error_model="numpy")
def read_value(codes, params, is_high, groups, group_size, out, largest, like, lanes):
    """One token of V."""
    for group in range(groups):
        zero, scale = get(params, 2 * group), get(params, 2 * group + 1)
        for channel in range(group * group_size, (group + 1) * group_size, lanes):
            both = load_like(advance(codes, channel), like)
            code = high_nibbles(both) if is_high else low_nibbles(both)
            store(advance(out, channel), 0, real(code, zero, scale, largest))


@cache
def dequantize_kernel(
    dtype: str, bounds_dtype: str, head_size: int, groups: int, page_size: int, block_size: int
):
    """The kernel of one configuration. A work item is (block, KV head)."""
    build = INSTRUCTIONS
    coded, largest = bounds_dtype == "uint8", LARGEST[dtype]
    bounds_size = 2 * head_size
    half = page_size // 2
    pages_per_block = block_size // page_size
    lanes = min(LANES, half)
    group_size = head_size // groups
    value_lanes = math.gcd(LANES, group_size)

    @njit(**KERNEL_OPTIONS)
    def kernel(
        threads, counter, key_codes, key_block, key_head, value_codes, value_block, value_head, value_params,
        value_params_block, value_params_head, bounds, bounds_block, bounds_head, params, params_block,
        params_head, key_out, key_out_block, key_out_head, value_out, value_out_block, value_out_head,
        blocks, num_tokens, count, kv_heads,
    ):  # fmt: skip
        build  # noqa: B018
        for _ in prange(threads):
            found = stack("float32", bounds_size)
            like, value_like = zeros(1, 1, lanes), zeros(1, 1, value_lanes)
            while True:
                item = next_item(pointer(counter, "int64"))
                place, head = item // kv_heads, item % kv_heads
                if place >= count:
                    break
                block = get(pointer(blocks, "int32"), place)
                wanted = get(pointer(num_tokens, "int32"), place)
                codes = advance(pointer(key_codes, "uint8"), block * key_block + head * key_head)
                values = advance(pointer(value_codes, "uint8"), block * value_block + head * value_head)
                start = block * value_params_block + head * value_params_head
                words = advance(pointer(value_params, "bfloat16"), start)
                limits = advance(pointer(bounds, bounds_dtype), block * bounds_block + head * bounds_head)
                pairs = advance(pointer(params, "float32"), block * params_block + head * params_head)
                start = place * key_out_block + head * key_out_head
                keys_to = advance(pointer(key_out, dtype), start)
                start = place * value_out_block + head * value_out_head
                values_to = advance(pointer(value_out, dtype), start)
                for page in range(pages_per_block):
                    first = page * page_size
                    page_bounds, pair = advance(limits, page * bounds_size), advance(pairs, page * 2)
                    read_bounds(page_bounds, pair, coded, head_size, found)
                    page_codes, target = advance(codes, page * half * head_size), advance(keys_to, first)
                    read_keys(
                        page_codes, found, head_size, half, wanted - first, target, block_size, largest, like,
                        lanes,
                    )  # fmt: skip
                    for token in range(first, first + page_size):
                        target = advance(values_to, token * head_size)
                        if token < wanted:
                            row = page * half + token % half
                            read_value(
                                advance(values, row * head_size), advance(words, token * groups * 2),
                                token % page_size >= half, groups, group_size, target, largest,
                                value_like, value_lanes,
                            )  # fmt: skip
                        else:
                            for channel in range(0, head_size, LANES):
                                store(advance(target, channel), 0, zeros(1, 1, LANES))

    return kernel


def dequantize_blocks(
    cache: Int4Cache,
    blocks: torch.Tensor,
    num_tokens: torch.Tensor,
    key_out: torch.Tensor,
    value_out: torch.Tensor,
) -> None:
    """Writes the first tokens of n blocks in the model's dtype, as prefill reads them; 0 behind them.

    Args:
        cache: Codes of K in channel-major pages, those of V in token-major ones.
        blocks: ``[n]`` int32, blocks of the cache.
        num_tokens: ``[n]`` int32, tokens of each block that are wanted, 0 to N.
        key_out: ``[>= n, H, N, D]``, channel-major: strides ``(.., .., 1, N)``; its first n blocks written.
        value_out: ``[>= n, H, N, D]``, token-major: strides ``(.., .., D, 1)``; likewise.
    """
    key_cache, value_cache = cache
    _, kv_heads, pages_per_block, half, head_size = check_int4(key_cache, value_cache)
    bounds_dtype, dtype = check_bounds(key_cache.bounds, head_size), check_caches(key_out, value_out)
    count, block_size = len(blocks), pages_per_block * 2 * half
    if len(key_out) < count or key_out.shape[1:] != (kv_heads, block_size, head_size):
        raise ValueError(
            f"key_out: expected [>= {count}, {kv_heads}, {block_size}, {head_size}], got "
            f"{tuple(key_out.shape)}"
        )
    check_integers("blocks", blocks, torch.int32, count)
    check_integers("num_tokens", num_tokens, torch.int32, count)
    groups = value_cache.params.shape[3]
    kernel = dequantize_kernel(dtype, bounds_dtype, head_size, groups, 2 * half, block_size)
    threads, counter = use_torch_threads(), new_counter()
    kernel(
        threads, counter.ctypes.data, *addresses_of(key_cache.codes, value_cache.codes, value_cache.params),
        *bound_addresses(key_cache.bounds), *addresses_of(key_out, value_out), blocks.data_ptr(),
        num_tokens.data_ptr(), count, kv_heads,
    )  # fmt: skip
