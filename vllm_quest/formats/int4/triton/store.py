"""Quantizes K and V of new tokens into 4-bit pages and widens the pages' bounds, in one launch.

As in `store`, one program owns a touched page: that of the page's last token in this call. All pages of a
block share its residuals, which only the program of the block's last page writes. A page that goes on needs
the residuals that are there before; where it is not the block's last page, that program stores it, too, and
first.
"""

import torch
import triton
import triton.language as tl

from vllm_quest.formats.int4 import Int4Cache
from vllm_quest.formats.int4.triton.store_page import store_page
from vllm_quest.formats.int4.triton.structs import Int4Parts
from vllm_quest.kernels.triton.launch import warps_for
from vllm_quest.kernels.triton.structs import PerHead
from vllm_quest.kernels.triton.touched import SPREAD_TOKENS, find_new, page_ends

__all__ = ["store"]

ELEMENTS_PER_THREAD = 8  # of half a page: 16 bytes of K


@triton.jit(do_not_specialize=["num_tokens"])
def _store_int4_kernel(
    key,
    value,
    cache,
    slot_mapping,
    num_tokens,
    shape: tl.constexpr,
    BLOCK_PAD: tl.constexpr,
    TOKENS: tl.constexpr,
):
    BLOCK_SIZE: tl.constexpr = shape.BLOCK_SIZE
    PAGE_SIZE: tl.constexpr = shape.PAGE_SIZE
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    kv_head = tl.program_id(1).to(tl.int64)
    pending = page_ends(slot_mapping, token, num_tokens, PAGE_SIZE)
    key = PerHead(key.data + kv_head * key.stride_head, key.stride_row, key.stride_head)
    value = PerHead(value.data + kv_head * value.stride_head, value.stride_row, value.stride_head)
    run = kv_head * cache.stride_kv_head
    last = tl.min(pending, 0)
    while last < num_tokens:
        last_slot = tl.load(slot_mapping + last)
        following = tl.load(slot_mapping + last + 1, mask=last + 1 < num_tokens, other=-1)
        ends_block = (following != last_slot + 1) | (following % BLOCK_SIZE == 0)
        # The block's first new token, and the end of its page.
        position = tl.arange(0, BLOCK_PAD)
        last_position = (last_slot % BLOCK_SIZE).to(tl.int32)
        _, is_new = find_new(slot_mapping, last, last_slot, last_position - position)
        first = tl.min(tl.where(is_new, position, BLOCK_PAD), 0)
        end = first // PAGE_SIZE * PAGE_SIZE + PAGE_SIZE - 1
        goes_on = first % PAGE_SIZE > 0
        # A page that goes on is left to the program of the block's last page, which begins with it.
        is_left = goes_on & (last_position <= end) & (ends_block == 0)
        begins_with_it = goes_on & (last_position > end) & ends_block
        current = tl.where(is_left, last + 1, tl.where(begins_with_it, last - last_position + end, last))
        while current <= last:
            residual_rows = tl.where(ends_block & (current == last), PAGE_SIZE // 2, 0)
            store_page(key, value, cache, slot_mapping, current, run, residual_rows, shape)
            tl.debug_barrier()
            current = tl.where(current == last, last + 1, last)
        last = tl.min(tl.where(pending > last, pending, num_tokens), 0)


def store(key: torch.Tensor, value: torch.Tensor, cache: Int4Cache, slot_mapping: torch.Tensor) -> None:
    """Quantizes K and V of new tokens and widens the range of every page that they touch. One launch.

    The new tokens of one block follow each other in `slot_mapping`, in the order of their slots, as vLLM
    schedules them; padding may be anywhere else.

    Args:
        key: ``[T, H, D]``, the model's dtype, contiguous in D.
        value: ``[T, H, D]``, likewise.
        cache: Codes in token-major pages; written.
        slot_mapping: ``[T]`` int64, ``block * N + position in the block``; -1 is padding and is skipped. Rows
            of `key` beyond T are padding too.

    Raises:
        ValueError: A shape, stride or dtype that the kernel does not handle.
    """
    num_tokens = slot_mapping.shape[0]
    if num_tokens == 0:
        return
    parts = Int4Parts.of(*cache)
    if key.dtype != value.dtype or key.stride(2) != 1 or value.stride(2) != 1:
        raise ValueError("key, value: need the same dtype, contiguous in D")
    if slot_mapping.dtype != torch.int64:
        raise ValueError(f"slot_mapping: {slot_mapping.dtype}; needed: int64")
    tokens = 1 if num_tokens <= SPREAD_TOKENS else parts.page_size
    elements = parts.page_size // 2 * triton.next_power_of_2(parts.head_size)
    _store_int4_kernel[(triton.cdiv(num_tokens, tokens), parts.num_kv_heads)](
        PerHead.of(key),
        PerHead.of(value),
        parts.pages,
        slot_mapping,
        num_tokens,
        shape=parts.shape,
        BLOCK_PAD=triton.next_power_of_2(parts.block_size),
        TOKENS=tokens,
        num_warps=warps_for(elements, ELEMENTS_PER_THREAD, key.device),
    )
