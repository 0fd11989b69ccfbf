"""Device helpers of both stores: the pages that a call's new tokens touch.

The tokens of a request follow each other in a call, so a page's new tokens are found from its last one.
"""

import triton
import triton.language as tl

__all__ = ["SPREAD_TOKENS", "find_new", "page_ends"]

# Up to here every token has a program of its own, so that a decode batch is spread over the device; beyond, a
# program looks after as many tokens as a page has, most of which are of one page.
SPREAD_TOKENS = 512


@triton.jit
def page_ends(slot_mapping, token, num_tokens, PAGE_SIZE: tl.constexpr):
    """Tokens that are the last ones of their pages in this call, as they are; `num_tokens` for all others."""
    slot = tl.load(slot_mapping + token, mask=token < num_tokens, other=-1)
    next_slot = tl.load(slot_mapping + token + 1, mask=token + 1 < num_tokens, other=-1)
    ends_page = (slot >= 0) & ((next_slot != slot + 1) | (next_slot % PAGE_SIZE == 0))
    return tl.where(ends_page, token, num_tokens)


@triton.jit
def find_new(slot_mapping, token, slot, back):
    """Which tokens lie `back` slots before `token`'s, and whether they are there, in this call."""
    source = token.to(tl.int64) - back
    asked = (back >= 0) & (source >= 0)
    found = tl.load(slot_mapping + source, mask=asked, other=-1)
    return source, asked & (found == slot - back)
