"""What kernels over 4-bit pages take; the rules for structs are those of `kernels.triton.structs`."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_quest.formats.int4 import Int4Keys, Int4Values
from vllm_quest.kernels.triton.structs import Number, Pointer

__all__ = [
    "Blocks",
    "Int4Pages",
    "Int4Parts",
    "Int4Shape",
    "NewTokens",
    "Places",
    "Residual",
    "Softmax",
    "Span",
    "WideQuery",
    "Words",
]


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


class Int4Shape(NamedTuple):
    """Of 4-bit pages. A constant."""

    HEAD_SIZE: int
    HEAD_PAD: int
    GROUPS: int  # of V's channels
    GROUPS_PAD: int
    CHANNELS_PAD: int  # of a group
    BLOCK_SIZE: int
    PAGE_SIZE: int


class Words(NamedTuple):
    """How attention unpacks words of codes. A constant."""

    KEY_DOT: tl.dtype  # in which K enters the tensor cores
    PTX: bool  # by instructions of NVIDIA's own


class Int4Parts(NamedTuple):
    """The checked parts of 4-bit pages, of the same runs, whose strides they share."""

    key: torch.Tensor  # codes of K
    key_residual: torch.Tensor
    value: torch.Tensor  # codes of V
    value_params: torch.Tensor  # ``[B, H, N, G]`` int32: zero point and scale in one word
    value_residual: torch.Tensor
    bounds: torch.Tensor
    bound_params: torch.Tensor | None
    stride_block: int  # in units of 16 bytes, and so that the compiler knows of the alignment
    stride_kv_head: int
    num_kv_heads: int
    block_size: int
    page_size: int
    head_size: int

    @property
    def shape(self) -> Int4Shape:
        """What every kernel is specialized for."""
        groups = self.value_params.shape[3]
        return Int4Shape(
            HEAD_SIZE=self.head_size,
            HEAD_PAD=triton.next_power_of_2(self.head_size),
            GROUPS=groups,
            GROUPS_PAD=triton.next_power_of_2(groups),
            CHANNELS_PAD=triton.next_power_of_2(self.head_size // groups),
            BLOCK_SIZE=self.block_size,
            PAGE_SIZE=self.page_size,
        )

    @property
    def pages(self) -> Int4Pages:
        """As the kernels that work on bytes are given them."""
        return Int4Pages(*self[:7], self.stride_block, self.stride_kv_head)

    @property
    def words(self) -> Int4Pages:
        """As attention is given them: two channels at a time, but for bounds that are no codes."""
        pair = torch.uint16
        return Int4Pages(
            self.key.view(pair),
            self.key_residual.view(pair),
            self.value.view(pair),
            self.value_params,
            self.value_residual.view(pair),
            self.bounds.view(torch.int32 if self.bound_params is None else pair),
            self.bound_params,
            self.stride_block,
            self.stride_kv_head,
        )

    @classmethod
    def of(cls, key_cache: Int4Keys, value_cache: Int4Values) -> "Int4Parts":
        """The parts of a cache.

        Raises:
            ValueError: They do not lie as a token-major `PageLayout` puts them.
        """
        codes, bounds = key_cache.codes, key_cache.bounds
        blocks, heads, pages, half, dim = codes.shape
        groups = value_cache.params.shape[3]
        if not 16 <= dim <= 256 or dim % 16:
            raise ValueError(f"head_size: {dim}; allowed for 4-bit pages: multiples of 16 up to 256")
        if half < 4 or half & (half - 1):
            raise ValueError(f"page_size: {2 * half}; allowed: a power of two, at least 8")
        rows = ((half, dim), (dim, 1))
        expected = {
            "key_cache": (codes, (pages, half, dim), (half * dim, dim, 1)),
            "key_cache.residual": (key_cache.residual, *rows),
            "value_cache": (value_cache.codes, (pages, half, dim), (half * dim, dim, 1)),
            "value_cache.params": (value_cache.params, (pages * 2 * half, groups, 2), (2 * groups, 2, 1)),
            "value_cache.residual": (value_cache.residual, *rows),
            "bounds": (bounds.values, (pages, 2, dim), (2 * dim, dim, 1)),
        }
        if bounds.params is not None:
            expected["bounds.params"] = (bounds.params, (pages, 2), (2, 1))
        for name, (part, shape, strides) in expected.items():
            outer = tuple(stride * part.element_size() for stride in part.stride()[:2])
            if (
                part.shape != (blocks, heads, *shape)
                or part.stride()[2:] != strides
                or outer != codes.stride()[:2]
                or any(stride % 16 for stride in outer)
            ):
                raise ValueError(
                    f"{name}: {tuple(part.shape)} with strides {part.stride()}; needed: "
                    f"{(blocks, heads, *shape)} in runs of token-major pages, each a multiple of 16 bytes"
                )
        return cls(
            key=codes,
            key_residual=key_cache.residual,
            value=value_cache.codes,
            value_params=value_cache.params.view(torch.int32).squeeze(-1),
            value_residual=value_cache.residual,
            bounds=bounds.values,
            bound_params=bounds.params,
            stride_block=codes.stride(0) // 16,
            stride_kv_head=codes.stride(1) // 16,
            num_kv_heads=heads,
            block_size=pages * 2 * half,
            page_size=2 * half,
            head_size=dim,
        )
