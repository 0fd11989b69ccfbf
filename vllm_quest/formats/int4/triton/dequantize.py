"""`dequantize_blocks`: 4-bit pages in the model's dtype, as dense attention reads them."""

import torch
import triton
import triton.language as tl

from vllm_quest.formats.int4 import Int4Cache
from vllm_quest.formats.int4.triton.structs import Blocks, Int4Parts
from vllm_quest.kernels.triton.codes import group_channels, limited, read_values, step_of, units_of
from vllm_quest.kernels.triton.launch import warps_for

__all__ = ["dequantize_blocks"]

ELEMENTS_PER_THREAD = 16  # of half a page: 16 bytes of codes


@triton.jit
def _store_tokens(out, place, wanted, tokens, channel, in_head, stride_token):
    """The tokens at `place`, ``[n]``; 0 from `wanted` on."""
    inside = tl.broadcast_to(in_head[None, :], tokens.shape)
    tokens = tl.where((place < wanted)[:, None], tokens, 0.0)
    tokens = limited(tokens, out.dtype.element_ty == tl.float16)
    tl.store(
        out + place[:, None] * stride_token + channel[None, :], tokens.to(out.dtype.element_ty), mask=inside
    )


@triton.jit
def _dequantize_kernel(cache, blocks, num_tokens, out, shape: tl.constexpr):
    HEAD_SIZE: tl.constexpr = shape.HEAD_SIZE
    GROUPS: tl.constexpr = shape.GROUPS
    GROUPS_PAD: tl.constexpr = shape.GROUPS_PAD
    PAGE_SIZE: tl.constexpr = shape.PAGE_SIZE
    HALF: tl.constexpr = PAGE_SIZE // 2
    place = tl.program_id(0).to(tl.int64)
    page = tl.program_id(1)
    kv_head = tl.program_id(2).to(tl.int64)
    block = tl.load(blocks + place).to(tl.int64)
    wanted = tl.load(num_tokens + place) - page * PAGE_SIZE
    row = tl.arange(0, HALF)
    is_read = row < wanted  # where its low token is not wanted, neither is the high one

    channel = tl.arange(0, shape.HEAD_PAD)
    in_head = channel < HEAD_SIZE
    run = block * cache.stride_block + kv_head * cache.stride_kv_head
    codes = run * 16 + page * (HALF * HEAD_SIZE)
    mask = is_read[:, None] & in_head[None, :]
    bytes = tl.load(cache.key_codes + codes + row[:, None] * HEAD_SIZE + channel[None, :], mask=mask, other=0)
    bytes = bytes.to(tl.int32)
    bounds = cache.bounds + (run * units_of(cache.bounds) + page * (2 * HEAD_SIZE))
    known = channel < tl.where(wanted > 0, HEAD_SIZE, 0)
    kmin = tl.load(bounds + channel, mask=known, other=0).to(tl.float32)
    kmax = tl.load(bounds + HEAD_SIZE + channel, mask=known, other=0).to(tl.float32)
    if cache.bound_params is not None:
        bound_params = cache.bound_params + (run * 4 + page * 2)
        offset = tl.load(bound_params, mask=wanted > 0, other=0.0)
        scale = tl.load(bound_params + 1, mask=wanted > 0, other=0.0)
        kmin, kmax = offset + scale * kmin, offset + scale * kmax
    zero, step = kmin[None, :], step_of(kmin, kmax)[None, :]
    start = place * out.stride_block + kv_head * out.stride_head + page * PAGE_SIZE * out.stride_token
    keys = zero + step * (bytes & 15).to(tl.float32)
    _store_tokens(out.key + start, row, wanted, keys, channel, in_head, out.stride_token)
    keys = zero + step * (bytes >> 4).to(tl.float32)
    _store_tokens(out.key + start, row + HALF, wanted, keys, channel, in_head, out.stride_token)

    channel, in_head = group_channels(GROUPS, HEAD_SIZE // GROUPS, GROUPS_PAD, shape.CHANNELS_PAD)
    mask = is_read[:, None] & in_head[None, :]
    bytes = tl.load(
        cache.value_codes + codes + row[:, None] * HEAD_SIZE + channel[None, :], mask=mask, other=0
    )
    bytes = bytes.to(tl.int32)
    group = tl.arange(0, GROUPS_PAD)[None, :]
    params = cache.value_params + run * 4 + page * (PAGE_SIZE * GROUPS)
    params = params + row[:, None] * GROUPS + group
    values = read_values((bytes & 15).to(tl.float32), params, is_read[:, None] & (group < GROUPS), GROUPS_PAD)
    _store_tokens(out.value + start, row, wanted, values, channel, in_head, out.stride_token)
    is_read = row + HALF < wanted
    params += HALF * GROUPS
    values = read_values((bytes >> 4).to(tl.float32), params, is_read[:, None] & (group < GROUPS), GROUPS_PAD)
    _store_tokens(out.value + start, row + HALF, wanted, values, channel, in_head, out.stride_token)


def dequantize_blocks(
    cache: Int4Cache,
    blocks: torch.Tensor,
    num_tokens: torch.Tensor,
    key_out: torch.Tensor,
    value_out: torch.Tensor,
) -> None:
    """Writes the first tokens of n blocks in the model's dtype, as prefill reads them; 0 behind them.

    Args:
        cache: 4-bit codes, in token-major pages.
        blocks: ``[n]`` int32, blocks of the cache.
        num_tokens: ``[n]`` int32, tokens of each block that are wanted, 0 to N.
        key_out: ``[>= n, H, N, D]``, contiguous in D; its first n blocks written.
        value_out: ``[>= n, H, N, D]``, with the strides of `key_out`; likewise.

    Raises:
        ValueError: A shape, stride or dtype that the kernel does not handle.
    """
    parts = Int4Parts.of(*cache)
    count, shape = len(blocks), (parts.num_kv_heads, parts.block_size, parts.head_size)
    if len(key_out) < count or key_out.shape[1:] != shape or value_out.shape != key_out.shape:
        raise ValueError(
            f"key_out, value_out: {tuple(key_out.shape)}, {tuple(value_out.shape)}; needed: {(count, *shape)}"
        )
    if key_out.stride() != value_out.stride() or key_out.stride(3) != 1:
        raise ValueError("key_out, value_out: need the same strides, contiguous in D")
    if blocks.dtype != torch.int32 or num_tokens.dtype != torch.int32 or len(num_tokens) != count:
        raise ValueError(f"blocks, num_tokens: {blocks.dtype}, {num_tokens.dtype}; needed: int32, [{count}]")
    if count == 0:
        return
    elements = parts.page_size // 2 * triton.next_power_of_2(parts.head_size)
    _dequantize_kernel[(count, parts.block_size // parts.page_size, parts.num_kv_heads)](
        parts.pages,
        blocks,
        num_tokens,
        Blocks(key_out, value_out, *key_out.stride()[:3]),
        shape=parts.shape,
        num_warps=warps_for(elements, ELEMENTS_PER_THREAD, blocks.device),
    )
