"""What kernels and their device helpers take: pointers with strides, and constants that belong together.

Triton flattens the tuples of a launch: every pointer and number is specialized as if it stood alone, by its
alignment, too; None and 1 are compiled in. `do_not_specialize` names whole arguments, so what a kernel must
not be specialized for is no part of a tuple.

Tuples of constants are arguments marked `tl.constexpr`. Triton 3.6 hands out their fields as plain Python
values: what goes into a shape, or is negated, is bound to a local `tl.constexpr` first. A kernel passes such
tuples on as they are: an assignment would make tensors of the constants. No field is called `values` or
`type`: in a kernel these are attributes of every tuple.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

__all__ = [
    "DOT_ROWS",
    "Blocks",
    "Bounds",
    "Budget",
    "Cache",
    "Contexts",
    "Group",
    "Int4Pages",
    "Int4Shape",
    "NewTokens",
    "PerHead",
    "Places",
    "Residual",
    "ScoreShape",
    "Scratch",
    "Selection",
    "Shape",
    "Softmax",
    "Span",
    "Split",
    "WideQuery",
    "Words",
]

DOT_ROWS = tl.constexpr(16)  # a tensor core takes at least this many query heads

Pointer = Any  # a tensor at the launch
Number = Any  # an int at the launch


class PerHead(NamedTuple):
    """A vector, contiguous, per row (or token) and head."""

    data: Pointer
    stride_row: Number
    stride_head: Number

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "PerHead":
        """A tensor of three dimensions."""
        return cls(tensor, tensor.stride(0), tensor.stride(1))


class Contexts(NamedTuple):
    """Where the rows' contexts lie, and how long they are."""

    block_table: Pointer  # ``[R, M]`` int32, contiguous in M
    stride_row: Number
    lengths: Pointer  # ``[R]`` int32, tokens to attention, pages to scoring

    @classmethod
    def of(cls, block_table: torch.Tensor, lengths: torch.Tensor) -> "Contexts":
        return cls(block_table, block_table.stride(0), lengths)


class Selection(NamedTuple):
    """The pages that rows of long contexts read."""

    page_indices: Pointer  # ``[R, H, K]`` int32, contiguous in K
    stride_row: Number
    stride_head: Number
    budget_pages: Number  # K

    @classmethod
    def of(cls, page_indices: torch.Tensor) -> "Selection":
        return cls(page_indices, page_indices.stride(0), page_indices.stride(1), page_indices.shape[2])


class Budget(NamedTuple):
    """How many pages are selected, and which of them always."""

    pages: Number
    sink_pages: Number
    recent_pages: Number


class Scratch(NamedTuple):
    """The memory of a `Workspace`."""

    data: Pointer
    arrivals: Pointer


class Split(NamedTuple):
    """Of the programs that share a (row, KV head)."""

    number: Number
    splits: Number  # of the launch
    active: Number  # of those, the ones that have a share


class WideQuery(NamedTuple):
    """The query of a tile of 4-bit pages, ``[M, HEAD_PAD / 2]`` float32 each."""

    even: Number
    odd: Number
    logit_scale: Number  # ``[M]``, of products with them


class Softmax(NamedTuple):
    """The softmax of M rows over the tokens of 4-bit pages read so far, in float32."""

    even: Number  # ``[M, GROUPS_PAD * CHANNELS_PAD / 2]``, weighted sums of V's even channels
    odd: Number
    peak: Number  # ``[M]``, like all below
    norm: Number
    zeros: Number  # the zero points' share of the sums


class Places(NamedTuple):
    """Where the pages of a tile are, for each byte row, ``[ROWS]``, and each row of the query, ``[M]``."""

    run: Number
    page: Number  # its number in the run
    head_run: Number
    head_page: Number


class Span(NamedTuple):
    """How far a row's list of pages goes."""

    pages: Number
    tokens: Number  # visible ones of those pages
    residual_start: Number  # from this page on with residuals


class Cache(NamedTuple):
    """K and V in the model's dtype."""

    key: Pointer
    value: Pointer
    stride_block: Number
    stride_kv_head: Number

    @classmethod
    def of(cls, key_cache: torch.Tensor, value_cache: torch.Tensor) -> "Cache":
        """``[B, H, N, D]`` each, of the same strides."""
        return cls(key_cache, value_cache, *key_cache.stride()[:2])


class Bounds(NamedTuple):
    """kmin and kmax of the pages."""

    minmax: Pointer  # ``[B, H, P, 2, D]``, contiguous in the last three dimensions
    params: Pointer  # ``[B, H, P, 2]`` float32, offset and scale of codes; None where those are no codes
    stride_block: Number
    stride_kv_head: Number
    stride_params: Number
    stride_params_head: Number

    @classmethod
    def of(cls, values: torch.Tensor, params: torch.Tensor | None, unit: int = 1) -> "Bounds":
        """The strides of the values count `unit` elements."""
        like = values if params is None else params
        block, head = values.stride()[:2]
        return cls(values, params, block // unit, head // unit, like.stride(0), like.stride(1))


class Int4Pages(NamedTuple):
    """4-bit pages; parts of the same runs, whose strides, in units of 16 bytes, they share."""

    key_codes: Pointer
    key_residual: Pointer
    value_codes: Pointer
    value_params: Pointer  # int32: zero point and scale in one word
    value_residual: Pointer
    bounds: Pointer
    bound_params: Pointer  # or None
    stride_block: Number
    stride_kv_head: Number


class NewTokens(NamedTuple):
    """Which tokens of half a page are new, for each byte row; in pairs of the low and the high nibble."""

    low_source: Number  # ``[HALF]``, of the call's tokens
    high_source: Number
    low: Number  # ``[HALF, 1]`` bool
    high: Number


class Residual(NamedTuple):
    """What of a block's residuals belongs to a page."""

    end: Number  # tokens before it have one
    rows: Number  # byte rows that become the page's, 0 or all
    tag: Number  # the page's number


class Blocks(NamedTuple):
    """K and V of blocks in the model's dtype, ``[n, H, N, D]`` each, contiguous in D."""

    key: Pointer
    value: Pointer
    stride_block: Number
    stride_head: Number
    stride_token: Number


class Group(NamedTuple):
    """Query heads that share a KV head. A constant."""

    SIZE: int
    PAD: int  # the same, padded to a power of two

    @classmethod
    def of(cls, size: int) -> "Group":
        return cls(size, triton.next_power_of_2(size))


class Shape(NamedTuple):
    """Of pages in the model's dtype. A constant."""

    HEAD_SIZE: int
    HEAD_PAD: int  # padded to a power of two, here and below
    TOKEN_STRIDE: int
    BLOCK_SIZE: int
    PAGE_SIZE: int

    @classmethod
    def of(cls, key_cache: torch.Tensor, page_size: int) -> "Shape":
        """Of a cache ``[B, H, N, D]``."""
        block_size, head_size = key_cache.shape[2:]
        return cls(head_size, triton.next_power_of_2(head_size), key_cache.stride(2), block_size, page_size)


class Int4Shape(NamedTuple):
    """Of 4-bit pages. A constant."""

    HEAD_SIZE: int
    HEAD_PAD: int
    GROUPS: int  # of V's channels
    GROUPS_PAD: int
    CHANNELS_PAD: int  # of a group
    BLOCK_SIZE: int
    PAGE_SIZE: int


class ScoreShape(NamedTuple):
    """Of bounds as they are scored. A constant."""

    HEAD_SIZE: int
    WIDTH: int  # words of a page's kmin and kmax, padded
    PAGES_PER_BLOCK: int
    SPAN: int  # pages that are looked up together
    UNIT: int  # words that the strides of the values count


class Words(NamedTuple):
    """How attention unpacks words of codes. A constant."""

    KEY_DOT: tl.dtype  # in which K enters the tensor cores
    PTX: bool  # by instructions of NVIDIA's own
