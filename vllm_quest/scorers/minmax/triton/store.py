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
from vllm_quest.kernels.triton.launch import bound_strides, check_bounds, check_cache
from vllm_quest.kernels.triton.touched import SPREAD_TOKENS, find_new, page_ends

__all__ = ["store"]

ELEMENTS_PER_THREAD = 16


@triton.jit
def _store_page(
    key,
    value,
    key_cache,
    value_cache,
    bounds,
    bound_params,
    slot_mapping,
    token,
    stride_key,
    stride_value,
    stride_block,
    stride_bounds,
    stride_params,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Stores the new tokens of the page that ends, in this call, with `token`, and the page's bounds."""
    slot = tl.load(slot_mapping + token)
    first_position = slot % BLOCK_SIZE // PAGE_SIZE * PAGE_SIZE
    position = tl.arange(0, PAGE_SIZE)
    back = slot % PAGE_SIZE - position  # how long before `token` the position's token was, or would have been
    written = back >= 0
    source, fresh = find_new(slot_mapping, token, slot, back)

    channel = tl.arange(0, HEAD_PAD)
    in_head = channel < HEAD_SIZE
    block = slot // BLOCK_SIZE * stride_block
    cached = block + (first_position + position)[:, None] * TOKEN_STRIDE + channel
    new = fresh[:, None] & in_head
    old = (written & (fresh == 0))[:, None] & in_head
    new_key = tl.load(key + source[:, None] * stride_key + channel, mask=new, other=0.0)
    new_value = tl.load(value + source[:, None] * stride_value + channel, mask=new, other=0.0)
    old_key = tl.load(key_cache + cached, mask=old, other=0.0)
    tl.store(key_cache + cached, new_key, mask=new)
    tl.store(value_cache + cached, new_value, mask=new)

    page_key = tl.where(new, new_key.to(tl.float32), old_key.to(tl.float32))
    kmin = tl.min(tl.where(written[:, None], page_key, float("inf")), 0)
    kmax = tl.max(tl.where(written[:, None], page_key, float("-inf")), 0)
    page = first_position // PAGE_SIZE
    bounds += slot // BLOCK_SIZE * stride_bounds + page * (2 * HEAD_SIZE)
    if bound_params is not None:
        bound_params += slot // BLOCK_SIZE * stride_params + page * 2
    write_bounds(bounds, bound_params, kmin, kmax, channel, HEAD_SIZE)


@triton.jit(do_not_specialize=["num_tokens"])
def _store_kernel(
    key,
    value,
    key_cache,
    value_cache,
    bounds,
    bound_params,
    slot_mapping,
    num_tokens,
    stride_key,
    stride_key_head,
    stride_value,
    stride_value_head,
    stride_block,
    stride_kv_head,
    stride_bounds,
    stride_bounds_head,
    stride_params,
    stride_params_head,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    kv_head = tl.program_id(1).to(tl.int64)
    pending = page_ends(slot_mapping, token, num_tokens, PAGE_SIZE)
    key += kv_head * stride_key_head
    value += kv_head * stride_value_head
    key_cache += kv_head * stride_kv_head
    value_cache += kv_head * stride_kv_head
    bounds += kv_head * stride_bounds_head
    if bound_params is not None:
        bound_params += kv_head * stride_params_head
    last = tl.min(pending, 0)
    while last < num_tokens:
        _store_page(
            key,
            value,
            key_cache,
            value_cache,
            bounds,
            bound_params,
            slot_mapping,
            last,
            stride_key,
            stride_value,
            stride_block,
            stride_bounds,
            stride_params,
            HEAD_SIZE,
            HEAD_PAD,
            TOKEN_STRIDE,
            BLOCK_SIZE,
            PAGE_SIZE,
        )
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
    head_pad = triton.next_power_of_2(head_size)
    _store_kernel[(triton.cdiv(num_tokens, tokens), num_kv_heads)](
        key,
        value,
        key_cache,
        value_cache,
        *summary,
        slot_mapping,
        num_tokens,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        key_cache.stride(0),
        key_cache.stride(1),
        *bound_strides(summary),
        HEAD_SIZE=head_size,
        HEAD_PAD=head_pad,
        TOKEN_STRIDE=key_cache.stride(2),
        BLOCK_SIZE=block_size,
        PAGE_SIZE=page_size,
        TOKENS=tokens,
        num_warps=max(1, min(8, page_size * head_pad // (32 * ELEMENTS_PER_THREAD))),
    )
