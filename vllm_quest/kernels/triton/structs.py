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
    "Bounds",
    "Budget",
    "Cache",
    "Contexts",
    "Group",
    "PerHead",
    "ScoreShape",
    "Scratch",
    "Selection",
    "Shape",
    "Split",
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


class ScoreShape(NamedTuple):
    """Of bounds as they are scored. A constant."""

    HEAD_SIZE: int
    WIDTH: int  # words of a page's kmin and kmax, padded
    PAGES_PER_BLOCK: int
    SPAN: int  # pages that are looked up together
    UNIT: int  # words that the strides of the values count
