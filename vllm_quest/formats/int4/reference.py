"""K and V in 4 bits, in plain torch: quantize while storing, dequantize to attend. Drawn in docs/int4.md.

K is quantized per channel within a page (KIVI, section 3.2), and the page's kmin and kmax, which QUEST keeps
anyway, are the zero point and the range: ``k = kmin + (kmax - kmin) / 15 * code``. V is quantized per token,
head and group of channels (FlexGen's format), ``v = zero + scale * code``.
"""

from __future__ import annotations

import torch

from vllm_quest.formats.auto import AutoCache
from vllm_quest.formats.auto.reference import read as read_auto
from vllm_quest.formats.int4 import Int4Cache, Int4Keys, Int4Values
from vllm_quest.kernels.bounds import TINY, read_bounds, round_down, round_up, write_bounds
from vllm_quest.kernels.reference import attention

__all__ = ["attend_pages", "dequantize_blocks", "dequantized", "filling_pages", "limited", "store"]

LARGEST = 2.0**126  # what larger elements, infinite ones too, are stored as: a range must be finite, too
STEPS = 15  # of a 4-bit code
FINE = 16  # an 8-bit code counts sixteenths of such a step, from half a step below zero: 16 * k + 8
NO_FRACTION = FINE // 2  # the residual, low nibble of an 8-bit code, of what its 4-bit code hits exactly
TAGS = 16  # page numbers that a residual's tag, a nibble, tells apart


def unpack(codes: torch.Tensor) -> torch.Tensor:
    """``[..., S / 2, D]`` bytes to ``[..., S, D]`` nibbles: token i is low, token i + S / 2 high."""
    return torch.cat((codes & 15, codes >> 4), -2)


def pack(nibbles: torch.Tensor) -> torch.Tensor:
    """The inverse of `unpack`."""
    low, high = nibbles.chunk(2, -2)
    return low | high << 4


def key_steps(bounds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Zero point and step, ``[..., 1, D]`` each, of pages with these bounds, ``[..., 2, D]``."""
    kmin, kmax = bounds[..., :1, :], bounds[..., 1:, :]
    return kmin, kmax / STEPS - kmin / STEPS


def inverse(step: torch.Tensor) -> torch.Tensor:
    return torch.where(step > TINY, 1 / step, 0)


def store(key: torch.Tensor, value: torch.Tensor, cache: Int4Cache, slot_mapping: torch.Tensor) -> None:
    """Quantizes K and V of new tokens into their pages, and widens the pages' bounds.

    A page that is being filled has a range that grows. When it does, the tokens already there are quantized
    anew, from 8-bit codes: the high nibble is the page's 4-bit code, the low one lies in the block's
    residual. So a token's error is that of one 4-bit quantization plus, each time the range grows, one of 8
    bits. V has a range per token, and a residual for attention only, which reads both. A block has one
    residual of each: that of the page that was written last. The page's number stands where K's residual of
    its last token would, which is never needed: with that token the page is full. Bounds of a page that goes
    on are widened, not recomputed: a rejected draft stays in them until the page starts anew.

    Args:
        key: ``[T, H, D]``, the model's dtype.
        value: ``[T, H, D]``.
        cache: Written, the bounds too.
        slot_mapping: ``[T]`` int64, ``block * N + position in the block``, ascending within a page; -1 is
            padding and is skipped.
    """
    key_cache, value_cache = cache
    pages_per_block, half = key_cache.codes.shape[2:4]
    page_size = 2 * half
    real = slot_mapping >= 0
    slots = slot_mapping[real]
    if slots.numel() == 0:
        return
    pages, owner = torch.unique(slots // page_size, return_inverse=True)
    first = torch.full_like(pages, page_size).scatter_reduce_(0, owner, slots % page_size, "amin")
    block, page = pages // pages_per_block, pages % pages_per_block
    position = torch.arange(page_size)
    is_older = (position < first[:, None])[:, None, :, None]  # [pages, 1, S, 1]
    is_new = torch.zeros(len(pages), page_size, dtype=torch.bool)
    is_new[owner, slots % page_size] = True
    is_new = is_new[:, None, :, None]
    owns_residual = torch.cat(
        (block[1:] != block[:-1], torch.tensor([True]))
    )  # from now on; pages are sorted

    def by_page(tokens: torch.Tensor) -> torch.Tensor:
        placed = tokens.new_zeros(len(pages), page_size, *tokens.shape[1:])
        placed[owner, slots % page_size] = tokens[real]
        return placed.float().clamp(-LARGEST, LARGEST).transpose(1, 2)  # [pages, H, S, D]

    had_residual = _has_residual(key_cache, block, page)
    _store_keys(by_page(key), key_cache, block, page, is_older, is_new, had_residual, owns_residual)
    _store_values(by_page(value), value_cache, block, page, is_older & had_residual, is_new, owns_residual)


def _store_keys(
    new_keys: torch.Tensor,
    key_cache: Int4Keys,
    block: torch.Tensor,
    page: torch.Tensor,
    is_older: torch.Tensor,
    is_new: torch.Tensor,
    had_residual: torch.Tensor,
    owns_residual: torch.Tensor,
) -> None:
    """`new_keys` of n pages, ``[n, H, S, D]``, beside the older ones, which are quantized anew."""
    old_keys = _fine_keys(key_cache, block, page, had_residual)
    kmin = new_keys.masked_fill(~is_new, torch.inf).amin(2)
    kmax = new_keys.masked_fill(~is_new, -torch.inf).amax(2)
    write_bounds(key_cache.bounds, block, page, kmin, kmax, goes_on=is_older.any(2).flatten())

    keys = torch.where(is_older, old_keys, new_keys).masked_fill(~(is_older | is_new), 0)
    fine = _fine_codes(keys, *_page_steps(key_cache, block, page))
    key_cache.codes[block, :, page] = pack(fine >> 4)
    residual = fine & 15
    residual[:, :, -1] = (page % TAGS)[:, None, None].byte()
    key_cache.residual[block[owns_residual]] = pack(residual[owns_residual])


def _store_values(
    new_values: torch.Tensor,
    value_cache: Int4Values,
    block: torch.Tensor,
    page: torch.Tensor,
    has_fraction: torch.Tensor,
    is_new: torch.Tensor,
    owns_residual: torch.Tensor,
) -> None:
    """`new_values` of n pages, ``[n, H, S, D]``, beside the older ones, which stay as they are."""
    groups = value_cache.params.shape[3]
    grouped = new_values.unflatten(-1, (groups, -1))
    zero = round_down(grouped.amin(-1), torch.bfloat16)
    scale = round_up(grouped.amax(-1) / STEPS - zero.float() / STEPS, torch.bfloat16)
    fine = _fine_codes(grouped, zero.float()[..., None], scale.float()[..., None]).flatten(-2)
    kept = unpack(value_cache.codes[block, :, page])
    value_cache.codes[block, :, page] = pack(torch.where(is_new, fine >> 4, kept))
    kept = unpack(value_cache.residual[block]).where(has_fraction, NO_FRACTION)
    residual = torch.where(is_new, fine & 15, kept)
    value_cache.residual[block[owns_residual]] = pack(residual[owns_residual])
    params = value_cache.params.unflatten(2, (-1, is_new.shape[2]))  # [B, H, P, S, G, 2]
    params[block, :, page] = torch.where(
        is_new[..., None], torch.stack((zero, scale), -1), params[block, :, page]
    )


def _has_residual(key_cache: Int4Keys, block: torch.Tensor, page: torch.Tensor) -> torch.Tensor:
    """Whether the residuals of K and V are those of n pages, ``[n, H, 1, 1]``."""
    owner = key_cache.residual[block, :, -1:, :1] >> 4
    return owner == (page % TAGS)[:, None, None, None]


def _fine_codes(elements: torch.Tensor, zero: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """8-bit codes, uint8: the 4-bit code, and in the low nibble sixteenths of a step from -8 on."""
    fine = ((elements - zero) * (inverse(step) * FINE)).round().clamp(0, STEPS * FINE) + NO_FRACTION
    return fine.to(torch.uint8)


def _fractions(residual: torch.Tensor) -> torch.Tensor:
    """What the low nibbles add to 4-bit codes."""
    return (residual.float() - NO_FRACTION) / FINE


def _fine_keys(
    key_cache: Int4Keys, block: torch.Tensor, page: torch.Tensor, has_residual: torch.Tensor
) -> torch.Tensor:
    """The keys in n pages, ``[n, H, S, D]``, from 8 bits where the block's residual is the page's.

    The last token of a page, in whose place the page's number stands, has 4 bits always.
    """
    code = unpack(key_cache.codes[block, :, page]).float()
    fraction = torch.where(has_residual, _fractions(unpack(key_cache.residual[block])), 0)
    fraction[:, :, -1] = 0
    zero, step = _page_steps(key_cache, block, page)
    return zero + step * (code + fraction)


def _fine_values(
    value_cache: Int4Values, block: torch.Tensor, page: torch.Tensor, has_residual: torch.Tensor
) -> torch.Tensor:
    """V in n pages, as `_fine_keys`; the last token of a page has a residual too."""
    code = unpack(value_cache.codes[block, :, page]).float()
    fraction = torch.where(has_residual, _fractions(unpack(value_cache.residual[block])), 0)
    params = value_cache.params.unflatten(2, (-1, code.shape[2]))
    return _values(code + fraction, params[block, :, page])


def _values(codes: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    """V, ``[..., D]``, from codes in float32 and zero points and scales ``[..., G, 2]``."""
    zero, scale = params.float().unbind(-1)
    grouped = codes.unflatten(-1, (zero.shape[-1], -1))
    return (zero[..., None] + scale[..., None] * grouped).flatten(-2)


def _page_steps(
    key_cache: Int4Keys, block: torch.Tensor, page: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Zero point and step of n pages, ``[n, H, 1, D]`` each."""
    return key_steps(read_bounds(key_cache.bounds, block)[torch.arange(len(block)), :, page])


def filling_pages(
    cache: Int4Cache, block_table: torch.Tensor, seq_lens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of every row's last page as attention reads them: from 8 bits where it has the residual.

    Args:
        cache: 4-bit codes.
        block_table: ``[R, M]`` int32, the row's blocks in order.
        seq_lens: ``[R]`` int32, at least 1.

    Returns:
        ``[R, H, S, D]`` float32 each; garbage where no token was stored.
    """
    key_cache, value_cache = cache
    pages_per_block, half = key_cache.codes.shape[2:4]
    last = (seq_lens.long() - 1) // (2 * half)
    block = block_table.long().gather(1, last[:, None] // pages_per_block)[:, 0]
    page = last % pages_per_block
    has_residual = _has_residual(key_cache, block, page)
    return (
        _fine_keys(key_cache, block, page, has_residual),
        _fine_values(value_cache, block, page, has_residual),
    )


def dequantized(cache: Int4Cache) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole cache in float32: K and V, ``[B, H, N, D]`` each; garbage where no token was stored.

    From 4 bits everywhere, the pages that are being filled included.
    """
    key_cache, value_cache = cache
    zero, step = key_steps(read_bounds(key_cache.bounds, torch.arange(len(key_cache.codes))))
    keys = zero + step * unpack(key_cache.codes).float()
    codes = unpack(value_cache.codes).flatten(2, 3).float()  # [B, H, N, D]
    return keys.flatten(2, 3), _values(codes, value_cache.params)


def dequantize_blocks(
    cache: Int4Cache,
    blocks: torch.Tensor,
    num_tokens: torch.Tensor,
    key_out: torch.Tensor,
    value_out: torch.Tensor,
) -> None:
    """Writes the first tokens of n blocks in the model's dtype, as prefill reads them; 0 behind them.

    Bounds and zero points are rounded outward, in float16 beyond its largest number; that is what is read.

    Args:
        cache: 4-bit codes.
        blocks: ``[n]`` int32, blocks of the cache.
        num_tokens: ``[n]`` int32, tokens of each block that are wanted, 0 to N.
        key_out: ``[>= n, H, N, D]``, its first n blocks written.
        value_out: Likewise.
    """
    keys, values = dequantized(cache)
    is_wanted = (torch.arange(key_out.shape[2]) < num_tokens[:, None])[:, None, :, None]
    for elements, out in ((keys, key_out), (values, value_out)):
        out[: len(blocks)] = limited(torch.where(is_wanted, elements[blocks.long()], 0), out.dtype)


def limited(elements: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In another dtype, and what would be infinite there as its largest number."""
    largest = torch.finfo(dtype).max
    return elements.clamp(-largest, largest).to(dtype)


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
    """As `kernels.reference.attention`, in the query's dtype; to `out` where it is given.

    The last page of a row is read with the residuals that it has while it is being filled. V may lie beyond
    float16, where zero points were rounded; outputs are limited to its largest number.

    Args:
        query: ``[R, Hq, D]``.
        cache: 4-bit codes.
        block_table: ``[R, M]`` int32.
        seq_lens: ``[R]`` int32; the last page may be partly filled.
        page_indices: ``[R, H, K]`` int32 page numbers within the row's context, -1 for none. None: every row
            reads every page.
        page_size: Tokens per page.
        scale: Factor of q . k.
        sparse_context: Rows of fewer tokens read every page, whatever `page_indices` holds.
        value_threshold: t, positive; None reads every V row.
        out: ``[R, Hq, D]`` in the query's dtype.
    """
    num_kv_heads = cache.key.codes.shape[1]
    filling = filling_pages(cache, block_table, seq_lens)
    whole = AutoCache(*dequantized(cache))

    def read(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        in_last = (tokens // page_size == (seq_lens[:, None, None] - 1) // page_size)[..., None]
        row, head = torch.arange(len(seq_lens))[:, None, None], torch.arange(num_kv_heads)[:, None]
        place = row, head, tokens % page_size
        keys, values = read_auto(whole, block_table, tokens)
        return torch.where(in_last, filling[0][place], keys), torch.where(in_last, filling[1][place], values)

    attended = attention(
        query,
        read,
        seq_lens,
        page_indices,
        num_kv_heads,
        page_size,
        scale,
        sparse_context=sparse_context,
        value_threshold=value_threshold,
    )
    attended = limited(attended, query.dtype)
    return attended if out is None else out.copy_(attended)
