"""Device helpers of every kernel that divides the work of one (row, KV head) among several programs."""

import triton
import triton.language as tl


@triton.jit
def split_range(items, tile: tl.constexpr, split, splits):
    """This split's share of `items`, in whole tiles: first item, end, and how many splits have a share."""
    per_split = tl.cdiv(tl.cdiv(items, tile), splits) * tile
    first = split * per_split
    # A row without items has no share at all; the maximum keeps the division defined.
    active = tl.cdiv(items, tl.maximum(per_split, 1))
    return first, tl.minimum(first + per_split, items), active


@triton.jit
def arrive_last(arrivals, expected):
    """Whether this program is the last of `expected`; what the others stored before is then visible to it.

    The counter goes back to zero for the next launch, so it is cleared once, when it is allocated.
    """
    # The atomic releases for one thread only: the barriers extend it to what all threads stored, and will
    # load.
    tl.debug_barrier()
    is_last = tl.atomic_add(arrivals, 1, sem="acq_rel") == expected - 1
    tl.debug_barrier()
    if is_last:
        tl.store(arrivals, 0)
    return is_last
