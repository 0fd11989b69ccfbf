"""The end of scoring by ``softmax_mean``, by the program that comes last to a (row, KV head)."""

import triton
import triton.language as tl

__all__ = ["softmax_mean"]


@triton.jit
def softmax_mean(out, raw, partials, total, max_pages, active, scale_log2, group: tl.constexpr):
    """Mean over the group of each head's softmax over the pages, from the raw scores and the splits' sums."""
    GROUP: tl.constexpr = group.SIZE
    GROUP_PAD: tl.constexpr = group.PAD
    head = tl.arange(0, GROUP_PAD)[None, :]
    peak = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    norm = tl.zeros([GROUP_PAD], tl.float32)
    for start in range(0, active, 64):
        split = start + tl.arange(0, 64)[:, None]
        partial = partials + split * 2 * GROUP + head
        known = (split < active) & (head < GROUP)
        split_peak = tl.load(partial, mask=known, other=float("-inf"))
        split_norm = tl.load(partial + GROUP, mask=known, other=0.0)
        new_peak = tl.maximum(peak, tl.max(split_peak, 0))
        # The columns beyond the group stay at -inf, and -inf less itself would be NaN; they enter no result.
        norm = norm * tl.exp2((peak - new_peak) * scale_log2)
        norm += tl.sum(split_norm * tl.exp2((split_peak - new_peak[None, :]) * scale_log2), 0)
        peak = new_peak
    TILE: tl.constexpr = 2048 // GROUP_PAD
    for start in tl.range(0, total, TILE, num_stages=3):
        page = start + tl.arange(0, TILE)
        known = (page < total)[:, None] & (head < GROUP)
        # Masked by the buffer's length and not by `total`, of which the compiler knows no alignment.
        inside = (page < max_pages)[:, None] & (head < GROUP)
        score = tl.load(raw + head * max_pages + page[:, None], mask=inside, other=0.0)
        share = tl.exp2((score - peak[None, :]) * scale_log2) / norm[None, :]
        tl.store(out + page, tl.sum(tl.where(known, share, 0.0), 1) / GROUP, mask=page < total)
