"""`attend_pages` over int4 pages, compiled: codes are unpacked in registers, once for a group of query heads.

Queries and weights take up the parameters of K and V (`folding`), so what is left is products with codes.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from numba import njit, prange

from vllm_quest.formats.int4 import Int4Cache
from vllm_quest.formats.int4.cpu.checks import check_int4
from vllm_quest.formats.int4.cpu.folding import (
    fold_key_residual,
    fold_keys,
    fold_value_residual,
    fold_values,
    forget_tag,
)
from vllm_quest.formats.int4.cpu.nibbles import (
    has_residual,
    multiply_add_keys,
    multiply_add_values,
    splat_rows,
    store_halves,
)
from vllm_quest.kernels.cpu.attend import attend
from vllm_quest.kernels.cpu.launch import (
    CACHE_LINE,
    INSTRUCTIONS,
    KERNEL_OPTIONS,
    LARGEST,
    REGISTERS,
    TILE_TOKENS,
    addresses_of,
    bound_addresses,
    check_bounds,
    largest_divisor,
)
from vllm_quest.kernels.cpu.memory import (
    advance,
    get,
    load,
    load_tile,
    next_item,
    page_start,
    pointer,
    prefetch,
    put,
    stack,
    store,
)
from vllm_quest.kernels.cpu.rounding import limited
from vllm_quest.kernels.cpu.simd import add, zeros
from vllm_quest.kernels.cpu.softmax import (
    begin,
    hide,
    hide_far,
    keep,
    merge,
    page_at,
    pages_to_read,
    raise_tops,
    to_weights,
    visible_tokens,
)

__all__ = ["attend_pages"]

LANES = 16


@cache
def attend_int4_kernel(
    query_dtype: str,
    bounds_dtype: str,
    head_size: int,
    group: int,
    groups: int,
    page_size: int,
    pages_per_block: int,
    skips: bool,
):
    """The kernel of one configuration; work is cut as in `attend_kernel`."""
    build = INSTRUCTIONS
    coded, largest = bounds_dtype == "uint8", LARGEST[query_dtype]
    query_size = group * head_size
    half = page_size // 2
    page_bytes = half * head_size
    page_params = page_size * groups * 2
    bounds_size = 2 * head_size
    piece = min(LANES // 2, half)  # bytes that fill a vector with codes of K
    key_lanes = 2 * piece
    key_cols = largest_divisor(half // piece, REGISTERS // group)
    key_step = piece * key_cols
    group_size = head_size // groups
    value_lanes = math.gcd(LANES, group_size)
    value_cols = largest_divisor(group_size // value_lanes, REGISTERS // group)
    value_step = value_lanes * value_cols
    token_lanes = min(LANES, page_size)
    tile_tokens = max(TILE_TOKENS, page_size)
    tile_pages = tile_tokens // page_size
    weights_size, fine_size = group * tile_tokens, group * page_size
    partial_size = group * (head_size + 2)

    @njit(**KERNEL_OPTIONS)
    def kernel(
        threads, counter, query, query_row, query_head, key_codes, key_block, key_head, key_residual,
        key_residual_block, key_residual_head, value_codes, value_block, value_head, value_params,
        value_params_block, value_params_head, value_residual, value_residual_block, value_residual_head,
        bounds, bounds_block, bounds_head, params, params_block, params_head, block_table, table_row,
        seq_lens, page_indices, index_row, index_head, budget, sparse_context, partial, out, rows, kv_heads,
        chunks, scale_log2, farthest,
    ):  # fmt: skip
        build  # noqa: B018
        for _ in prange(threads):
            q, weighted = stack("float32", query_size), stack("float32", query_size)
            steps, parts = stack("float32", query_size), stack("float32", query_size)
            tops, sums = stack("float32", group), stack("float32", group)
            zero_sums, no_parts = stack("float32", group), stack("float32", group)
            weights, folded = stack("float32", weights_size), stack("float32", weights_size)
            fine_weights = stack("float32", fine_size)
            nearness = stack("float32", tile_tokens)
            limit = np.float32(farthest)
            like = zeros(1, 1, token_lanes)
            while True:
                item = next_item(pointer(counter, "int64"))
                owner, chunk = item // chunks, item % chunks
                row, head = owner // kv_heads, owner % kv_heads
                if row >= rows:
                    break
                seq_len = get(pointer(seq_lens, "int32"), row)
                table = advance(pointer(block_table, "int32"), row * table_row)
                keys = advance(pointer(key_codes, "uint8"), head * key_head)
                key_residuals = advance(pointer(key_residual, "uint8"), head * key_residual_head)
                value_residuals = advance(pointer(value_residual, "uint8"), head * value_residual_head)
                values = advance(pointer(value_codes, "uint8"), head * value_head)
                words = advance(pointer(value_params, "bfloat16"), head * value_params_head)
                limits = advance(pointer(bounds, bounds_dtype), head * bounds_head)
                pairs = advance(pointer(params, "float32"), head * params_head)
                indices = advance(pointer(page_indices, "int32"), row * index_row + head * index_head)
                every = page_indices == 0 or seq_len < sparse_context
                source = advance(pointer(query, query_dtype), row * query_row + head * group * query_head)
                begin(source, query_head, group, head_size, np.float32(scale_log2), q, weighted, tops, sums)
                pages = pages_to_read(seq_len, page_size, budget, every)
                first, last = pages * chunk // chunks, pages * (chunk + 1) // chunks
                for start in range(first, last, tile_pages):
                    count = min(tile_pages, last - start)
                    fine = -1  # the page of this tile that has a residual
                    for i in range(count):
                        page = page_at(indices, start + i, every)
                        seen = visible_tokens(page, page_size, seq_len)
                        if seen > 0:
                            key = page_start(keys, key_block, table, page, pages_per_block, page_bytes)
                            value = page_start(values, value_block, table, page, pages_per_block, page_bytes)
                            following = page_at(indices, min(start + i + 1, last - 1), every)
                            if visible_tokens(following, page_size, seq_len) == 0:
                                following = page
                            coming = page_start(
                                keys, key_block, table, following, pages_per_block, page_bytes
                            )
                            for byte in range(0, page_bytes, CACHE_LINE):
                                prefetch(advance(coming, byte))
                                if not skips:
                                    prefetch(advance(value, byte))
                            page_bounds = page_start(
                                limits, bounds_block, table, page, pages_per_block, bounds_size
                            )
                            pair = page_start(pairs, params_block, table, page, pages_per_block, 2)
                            fold_keys(q, group, head_size, page_bounds, pair, coded, steps, zero_sums)
                            # A block has one, wherever its page is; only the context's last page reads it.
                            residual = page_start(
                                key_residuals, key_residual_block, table, page, pages_per_block, 0
                            )
                            place = page % pages_per_block
                            if (page + 1) * page_size >= seq_len and has_residual(residual, half, place):
                                fine = i
                                fold_key_residual(steps, group, head_size, parts, zero_sums, no_parts)
                            for byte in range(0, half, key_step):
                                tile = splat_rows(zero_sums, group, key_cols, key_lanes)
                                for channel in range(head_size):
                                    codes = advance(key, channel * half + byte)
                                    tile = multiply_add_keys(tile, advance(steps, channel), head_size, codes)
                                if fine == i:
                                    for channel in range(head_size):
                                        codes = advance(residual, channel * half + byte)
                                        tile = multiply_add_keys(
                                            tile, advance(parts, channel), head_size, codes
                                        )
                                target = advance(weights, i * page_size + byte)
                                store_halves(target, tile_tokens, half, tile)
                            if fine == i:
                                last_token = advance(weights, (i + 1) * page_size - 1)
                                forget_tag(last_token, tile_tokens, group, place, no_parts)
                        hide(weights, tile_tokens, group, i * page_size + seen, (i + 1) * page_size)
                    tokens = (count * page_size + LANES - 1) // LANES * LANES
                    hide(weights, tile_tokens, group, count * page_size, tokens)
                    raise_tops(weights, tile_tokens, tokens, group, head_size, tops, sums, weighted)
                    if skips:
                        hide_far(weights, tile_tokens, tokens, group, tops, limit, nearness)
                    to_weights(weights, tile_tokens, tokens, group, tops, sums)
                    for value_group in range(groups):
                        for g in range(group):
                            put(zero_sums, g, np.float32(0))
                        for i in range(count):
                            page = page_at(indices, start + i, every)
                            seen = visible_tokens(page, page_size, seq_len)
                            if seen > 0:
                                page_words = page_start(
                                    words, value_params_block, table, page, pages_per_block, page_params
                                )
                                fold_values(
                                    advance(weights, i * page_size), tile_tokens, group, page_words,
                                    value_group, groups, page_size, seen, advance(folded, i * page_size),
                                    zero_sums, like, token_lanes,
                                )  # fmt: skip
                        if fine >= 0:
                            fold_value_residual(
                                advance(folded, fine * page_size), tile_tokens, group, page_size,
                                fine_weights, zero_sums, like, token_lanes,
                            )  # fmt: skip
                        for channel in range(
                            value_group * group_size, (value_group + 1) * group_size, value_step
                        ):
                            target = advance(weighted, channel)
                            tile = add(
                                load_tile(target, head_size, group, value_cols, value_lanes),
                                splat_rows(zero_sums, group, value_cols, value_lanes),
                            )
                            if fine >= 0:
                                page = page_at(indices, start + fine, every)
                                residual = page_start(
                                    value_residuals, value_residual_block, table, page, pages_per_block, 0
                                )
                                for token in range(min(visible_tokens(page, page_size, seq_len), half)):
                                    nibbles = advance(residual, token * head_size + channel)
                                    weight = advance(fine_weights, token)
                                    tile = multiply_add_values(tile, weight, page_size, half, nibbles)
                            for i in range(count):
                                page = page_at(indices, start + i, every)
                                seen = visible_tokens(page, page_size, seq_len)
                                if seen > 0:
                                    value = page_start(
                                        values, value_block, table, page, pages_per_block, page_bytes
                                    )
                                    for token in range(min(seen, half)):
                                        place = i * page_size + token
                                        if (
                                            skips
                                            and get(nearness, place) <= -limit
                                            and get(nearness, place + half) <= -limit
                                        ):
                                            continue
                                        codes = advance(value, token * head_size + channel)
                                        weight = advance(folded, place)
                                        tile = multiply_add_values(tile, weight, tile_tokens, half, codes)
                            store(target, head_size, tile)
                results = pointer(partial, "float32")
                keep(weighted, tops, sums, group, head_size, advance(results, item * partial_size))
                if next_item(advance(pointer(counter, "int64"), 1 + owner)) == chunks - 1:
                    target = advance(pointer(out, query_dtype), owner * query_size)
                    results = advance(results, owner * chunks * partial_size)
                    merge(results, chunks, group, target, head_size)
                    for channel in range(0, query_size, LANES):
                        part = advance(target, channel)
                        store(part, 0, limited(load(part, LANES), largest))

    return kernel


def attend_pages(
    query: torch.Tensor,
    cache: Int4Cache,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    page_indices: torch.Tensor | None,
    page_size: int,
    scale: float,
    *,
    sparse_context: int = 0,
    value_threshold: float | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention over the tokens of the selected pages only (section 3.3, "approximate attention").

    Args:
        query: ``[R, Hq, D]`` float32, bfloat16 or float16, each head contiguous.
        cache: Codes of K in channel-major pages, those of V in token-major ones.
        block_table: As for `kernels.cpu.attend.attend`, and so are the others.
        seq_lens: Likewise.
        page_indices: Likewise.
        page_size: Likewise.
        scale: Likewise.
        sparse_context: Likewise.
        value_threshold: Likewise.
        out: Likewise.

    Returns:
        ``[R, Hq, D]`` in the query's dtype; computed in float32. A row without any page is 0.
    """
    key_cache, value_cache = cache
    _, kv_heads, pages_per_block, half, head_size = check_int4(key_cache, value_cache)
    if page_size != 2 * half:
        raise ValueError(f"page_size: the cache has pages of {2 * half} tokens, got {page_size}")
    bounds_dtype = check_bounds(key_cache.bounds, head_size)
    groups = value_cache.params.shape[3]
    caches = addresses_of(key_cache.codes, key_cache.residual, *value_cache)
    return attend(
        lambda query_dtype, group, skips: attend_int4_kernel(
            query_dtype, bounds_dtype, head_size, group, groups, page_size, pages_per_block, skips
        ),
        (*caches, *bound_addresses(key_cache.bounds)),
        query,
        kv_heads,
        head_size,
        block_table,
        seq_lens,
        page_indices,
        page_size,
        scale,
        sparse_context=sparse_context,
        value_threshold=value_threshold,
        out=out,
    )
