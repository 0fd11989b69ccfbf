"""Estimates of the softmax mass that each page holds, and how many pages reach a share of it.

Letters for the shapes: see `vllm_quest.kernels`; G query heads share a KV head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_quest.config import QuestConfig

if TYPE_CHECKING:
    from vllm_quest.backend.rows import SparseRows
    from vllm_quest.layout import PageViews

__all__ = ["ESTIMATES", "choose", "page_masses", "pages_for"]

# QUEST's upper bound for every key of the page; the page's mean key for every key; the keys themselves.
ESTIMATES = ("bound", "mean key", "true mass")


def page_masses(
    estimate: str, query: torch.Tensor, pages: PageViews, rows: SparseRows, scale: float, config: QuestConfig
) -> torch.Tensor:
    """Estimated share of the softmax in every page, mean over the query heads, ``[R, H, M * P]``.

    The pages that are always read are estimated by their keys: those are read anyway.
    """
    assert isinstance(pages.key, torch.Tensor)
    size, heads = config.page_size, pages.key.shape[1]
    parts = []
    _, lengths = torch.unique_consecutive(rows.block_table, dim=0, return_counts=True)
    first = 0
    for count in lengths.tolist():  # rows of one request
        part = slice(first, first + count)
        first += count
        blocks = rows.block_table[first - 1].long().clamp(min=0)
        keys = pages.key[blocks].movedim(0, 1).flatten(1, 2).float()  # [H, M * N, D]
        q = query[part].float().unflatten(1, (heads, -1)) * scale  # [r, H, G, D]
        position = torch.arange(keys.shape[1])
        unseen = (position >= rows.seq_lens[part, None])[:, None, None]
        logits = (q @ keys.mT).masked_fill(unseen, -torch.inf).unflatten(-1, (-1, size))
        exact = logits.logsumexp(-1)  # [r, H, G, M * P]
        if estimate == "true mass":
            log_mass = exact
        else:
            kmin, kmax = _extremes(estimate, keys.unflatten(1, (-1, size)))
            upper = q.clamp(min=0) @ kmax.mT + q.clamp(max=0) @ kmin.mT
            kept = _kept(rows.num_pages[part], exact.shape[-1], config)
            beyond = torch.arange(exact.shape[-1]) >= rows.num_pages[part, None]
            log_mass = exact.where((kept | beyond)[:, None, None], upper + np.log(size))
        parts.append(torch.softmax(log_mass, -1).mean(2))
    return torch.cat(parts)


def pages_for(
    shares: np.ndarray,
    scores: torch.Tensor,
    mass: torch.Tensor,
    num_pages: torch.Tensor,
    config: QuestConfig,
) -> np.ndarray:
    """Pages that all rows and KV heads together read for each of `shares`, ascending in (0, 1)."""
    _, before, always = _ranked(scores, mass, num_pages, config)
    reached = before[~always & (before <= 1)].numpy()
    return int(always.sum()) + np.searchsorted(np.sort(reached), shares)


def choose(
    share: float, scores: torch.Tensor, mass: torch.Tensor, num_pages: torch.Tensor, config: QuestConfig
) -> torch.Tensor:
    """The pages of best `scores` that together have `share` of the mass, ``[R, H, M * P]``; -1 elsewhere.

    Those that are always read come first.
    """
    order, before, always = _ranked(scores, mass, num_pages, config)
    taken = torch.zeros_like(always).scatter(-1, order, always | (before < share))
    return torch.arange(scores.shape[-1]).where(taken, -1).int()


def _ranked(
    scores: torch.Tensor, mass: torch.Tensor, num_pages: torch.Tensor, config: QuestConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pages in the order in which they are taken, the mass before each, and which are always read."""
    width = scores.shape[-1]
    kept = _kept(num_pages, width, config)[:, None]
    beyond = (torch.arange(width) >= num_pages[:, None])[:, None]
    order = scores.masked_fill(beyond, -torch.inf).masked_fill(kept, torch.inf).argsort(-1, descending=True)
    ranked = mass.gather(-1, order)
    before = (ranked.cumsum(-1) - ranked).masked_fill(beyond.expand_as(order).gather(-1, order), torch.inf)
    return order, before, kept.expand_as(order).gather(-1, order)


def _kept(num_pages: torch.Tensor, width: int, config: QuestConfig) -> torch.Tensor:
    page, total = torch.arange(width), num_pages[:, None]
    return ((page < config.sink_pages) | (page >= total - config.recent_pages)) & (page < total)


def _extremes(estimate: str, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """kmin and kmax, ``[H, M * P, D]`` each, of keys ``[H, M * P, S, D]``; the mean key as both."""
    if estimate == "bound":
        return keys.amin(2), keys.amax(2)
    return keys.mean(2), keys.mean(2)
