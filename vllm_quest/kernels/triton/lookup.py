"""Device helpers that find what is read: pages of a row's list, their blocks, and offsets there.

Blocks are looked up a tile ahead, pages another: K and V whose addresses are known are loaded several tiles
ahead, and nothing waits for a look-up. (Where a value is carried over two iterations as it is, Triton does
not pipeline a loop.)
"""

import triton
import triton.language as tl

__all__ = ["block_of", "page_at", "spread"]


@triton.jit
def page_at(place, listed, page_indices):
    """The pages at places of the row's list, up to `listed`; where that is 0, the list is of all pages."""
    return tl.load(page_indices + place, mask=place < listed, other=place)


@triton.jit
def block_of(page, place, end, block_table, PAGES_PER_BLOCK: tl.constexpr):
    """The blocks of the pages at these places, which end at `end`."""
    return tl.load(block_table + page // PAGES_PER_BLOCK, mask=place < end, other=0)


@triton.jit
def spread(first, size, SPAN: tl.constexpr, MULTIPLE: tl.constexpr):
    """Offsets of everything, ``[n * SPAN]``, from those of the first ones of spans, ``[n]``, `size` apart.

    All are multiples of MULTIPLE, which the compiler does not see behind a reshape.
    """
    if SPAN == 1:
        return first
    offset = tl.reshape(first[:, None] + (tl.arange(0, SPAN) * size)[None, :], [first.shape[0] * SPAN])
    return tl.multiple_of(offset, MULTIPLE)
