"""A slow QUEST that shares no code with the package: tokens in lists, loops, float64.

Tests drive it beside the real thing and compare bounds, selected pages and outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Context:
    """One request: its blocks, and the keys and values of its tokens, each [H, D]."""

    blocks: list[int]
    keys: list[np.ndarray] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)

    def page(self, page: int, page_size: int) -> np.ndarray:
        """Keys of one page, [tokens, H, D]."""
        return np.stack(self.keys[page * page_size : (page + 1) * page_size])

    def num_pages(self, page_size: int) -> int:
        return math.ceil(len(self.keys) / page_size)


def page_bounds(context: Context, page: int, page_size: int) -> tuple[np.ndarray, np.ndarray]:
    keys = context.page(page, page_size)
    return keys.min(axis=0), keys.max(axis=0)


def page_score(context: Context, page: int, page_size: int, query: np.ndarray, head: int) -> float:
    """The bound of one query head [D] over one page of one KV head."""
    kmin, kmax = page_bounds(context, page, page_size)
    total = 0.0
    for channel, q in enumerate(query.astype(np.float64)):
        total += max(q * float(kmin[head, channel]), q * float(kmax[head, channel]))
    return total


def reduced_scores(
    context: Context, page_size: int, queries: np.ndarray, head: int, scale: float, reduce: str
) -> list[float]:
    """One score per page for the query heads [G, D] that share KV head `head`."""
    pages = range(context.num_pages(page_size))
    each = np.array([[page_score(context, page, page_size, q, head) for page in pages] for q in queries])
    if reduce == "max":
        return list(each.max(axis=0))
    if reduce == "mean":
        return list(each.mean(axis=0))
    shifted = np.exp((each - each.max(axis=1, keepdims=True)) * scale)
    return list((shifted / shifted.sum(axis=1, keepdims=True)).mean(axis=0))


def selected_pages(scores: list[float], budget: int, sink: int, recent: int) -> list[int]:
    """Pages in ascending order; among equals the earlier one."""
    n = len(scores)
    always = [page for page in range(n) if page < sink or page >= n - recent]
    if n <= budget:
        return list(range(n))
    others = sorted((page for page in range(n) if page not in always), key=lambda page: -scores[page])
    return sorted(always + others[: budget - len(always)])


def tokens_of(context: Context, pages: list[int], page_size: int) -> list[int]:
    tokens = [t for page in pages for t in range(page * page_size, (page + 1) * page_size)]
    return [t for t in tokens if t < len(context.keys)]


def logits_of(context: Context, tokens: list[int], query: np.ndarray, head: int, scale: float) -> np.ndarray:
    return np.array([query.astype(np.float64) @ context.keys[t][head] * scale for t in tokens])


def near_tokens(
    context: Context, tokens: list[int], queries: np.ndarray, head: int, scale: float, threshold: float
) -> list[int]:
    """Those of `tokens` whose logit lies less than `threshold` below the top of a query head, of [G, D]."""
    near = set()
    for query in queries:
        logits = logits_of(context, tokens, query, head, scale)
        near |= {t for t, logit in zip(tokens, logits, strict=True) if logit > logits.max() - threshold}
    return sorted(near)


def attention(context: Context, tokens: list[int], query: np.ndarray, head: int, scale: float):
    """Output [D] of one query head over `tokens`."""
    logits = logits_of(context, tokens, query, head, scale)
    weights = np.exp(logits - logits.max())
    values = np.stack([context.values[t][head] for t in tokens]).astype(np.float64)
    return (weights / weights.sum()) @ values
