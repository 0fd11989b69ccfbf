"""Writes K and V of new tokens and the bounds of every page they touch, in one launch (section 3.2).

One program owns a touched page: that of the page's last token in this call. It finds the page's other new
tokens just before, since the tokens of a request follow each other, and takes what is older from the cache.
So no program reads what another one writes.
"""

import torch
import triton
import triton.language as tl

from vllm_quest.formats.auto import AutoCache
from vllm_quest.kernels.bounds import PageBounds
from vllm_quest.kernels.triton.bounds import write_bounds
from vllm_quest.kernels.triton.launch import check_bounds, check_cache
from vllm_quest.kernels.triton.structs import Bounds, Cache, PerHead, Shape
from vllm_quest.kernels.triton.touched import SPREAD_TOKENS, find_new, page_ends

__all__ = ["store"]

ELEMENTS_PER_THREAD = 16


@triton.jit
def _store_page(key, value, cache, bounds, slot_mapping, token, shape: tl.constexpr):
    """Stores the new tokens of the page that ends, in this call, with `token`, and the page's bounds.

    All pointers are at the KV head's part.
    """
    HEAD_SIZE: tl.constexpr = shape.HEAD_SIZE
    BLOCK_SIZE: tl.constexpr = shape.BLOCK_SIZE
    PAGE_SIZE: tl.constexpr = shape.PAGE_SIZE
    slot = tl.load(slot_mapping + token)
    first_position = slot % BLOCK_SIZE // PAGE_SIZE * PAGE_SIZE
    position = tl.arange(0, PAGE_SIZE)
    back = slot % PAGE_SIZE - position  # how long before `token` the position's token was, or would have been
    written = back >= 0
    source, fresh = find_new(slot_mapping, token, slot, back)

    channel = tl.arange(0, shape.HEAD_PAD)
    in_head = channel < HEAD_SIZE
    block = slot // BLOCK_SIZE * cache.stride_block
    cached = block + (first_position + position)[:, None] * shape.TOKEN_STRIDE + channel
    new = fresh[:, None] & in_head
    old = (written & (fresh == 0))[:, None] & in_head
    new_key = tl.load(key.data + source[:, None] * key.stride_row + channel, mask=new, other=0.0)
    new_value = tl.load(value.data + source[:, None] * value.stride_row + channel, mask=new, other=0.0)
    old_key = tl.load(cache.key + cached, mask=old, other=0.0)
    tl.store(cache.key + cached, new_key, mask=new)
    tl.store(cache.value + cached, new_value, mask=new)

    page_key = tl.where(new, new_key.to(tl.float32), old_key.to(tl.float32))
    kmin = tl.min(tl.where(written[:, None], page_key, float("inf")), 0)
    kmax = tl.max(tl.where(written[:, None], page_key, float("-inf")), 0)
    page = first_position // PAGE_SIZE
    minmax = bounds.minmax + slot // BLOCK_SIZE * bounds.stride_block + page * (2 * HEAD_SIZE)
    params = bounds.params
    if params is not None:
        params += slot // BLOCK_SIZE * bounds.stride_params + page * 2
    write_bounds(minmax, params, kmin, kmax, channel, HEAD_SIZE)


@triton.jit(do_not_specialize=["num_tokens"])
def _store_kernel(
    key, value, cache, bounds, slot_mapping, num_tokens, shape: tl.constexpr, TOKENS: tl.constexpr
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    kv_head = tl.program_id(1).to(tl.int64)
    pending = page_ends(slot_mapping, token, num_tokens, shape.PAGE_SIZE)
    key = PerHead(key.data + kv_head * key.stride_head, key.stride_row, key.stride_head)
    value = PerHead(value.data + kv_head * value.stride_head, value.stride_row, value.stride_head)
    start = kv_head * cache.stride_kv_head
    cache = Cache(cache.key + start, cache.value + start, cache.stride_block, cache.stride_kv_head)
    minmax = bounds.minmax + kv_head * bounds.stride_kv_head
    params = bounds.params
    if params is not None:
        params += kv_head * bounds.stride_params_head
    bounds = Bounds(
        minmax,
        params,
        bounds.stride_block,
        bounds.stride_kv_head,
        bounds.stride_params,
        bounds.stride_params_head,
    )
    last = tl.min(pending, 0)
    while last < num_tokens:
        _store_page(key, value, cache, bounds, slot_mapping, last, shape)
        last = tl.min(tl.where(pending > last, pending, num_tokens), 0)


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: AutoCache,
    summary: PageBounds,
    slot_mapping: torch.Tensor,
) -> None:
    """Writes K and V of new tokens and the bounds of every page they touch. One launch.

    The new tokens of one page follow each other in `slot_mapping`, in the order of their slots, as vLLM
    schedules them; padding may be anywhere else.

    Args:
        key: ``[T, H, D]``, the model's dtype, contiguous in D.
        value: ``[T, H, D]``, likewise.
        cache: K and V, ``[B, H, N, D]`` each, of equal strides, contiguous in D; written.
        summary: kmin and kmax of each page, written. A page holds a power of two of tokens.
        slot_mapping: ``[T]`` int64, ``block * N + position in the block``; -1 is padding and is skipped. Rows
            of `key` beyond T are padding too.

    Raises:
        ValueError: A shape, stride or dtype that the kernel does not handle.
    """
    key_cache, value_cache = cache
    num_kv_heads, block_size, head_size = key_cache.shape[1:]
    num_tokens, page_size = slot_mapping.shape[0], block_size // summary.values.shape[2]
    if num_tokens == 0:
        return
    check_cache(key_cache, value_cache, page_size)
    check_bounds(summary, head_size)
    if not key.dtype == value.dtype == key_cache.dtype == value_cache.dtype:
        raise ValueError(f"key, value: {key.dtype}, {value.dtype}; needed: the cache's {key_cache.dtype}")
    if key.stride(2) != 1 or value.stride(2) != 1 or slot_mapping.dtype != torch.int64:
        raise ValueError("key, value: contiguous in D; slot_mapping: int64")
    tokens = 1 if num_tokens <= SPREAD_TOKENS else page_size
    shape = Shape.of(key_cache, page_size)
    _store_kernel[(triton.cdiv(num_tokens, tokens), num_kv_heads)](
        PerHead.of(key),
        PerHead.of(value),
        Cache.of(key_cache, value_cache),
        Bounds.of(*summary),
        slot_mapping,
        num_tokens,
        shape=shape,
        TOKENS=tokens,
        num_warps=max(1, min(8, page_size * shape.HEAD_PAD // (32 * ELEMENTS_PER_THREAD))),
    )
