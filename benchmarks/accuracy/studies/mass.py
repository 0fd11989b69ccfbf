"""Estimates of the softmax mass that each page holds, and how many pages reach a share of it.

Letters for the shapes: see `vllm_quest.kernels`; G query heads share a KV head.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

__all__ = ["ESTIMATES", "Ranking", "choose", "page_masses", "pages_for"]

# QUEST's upper bound for every key of the page; the page's mean key for every key; the keys themselves.
ESTIMATES = ("bound", "mean key", "true mass")


class Ranking(NamedTuple):
    """The pages of a step's rows."""

    scores: torch.Tensor  # [R, H, M * P] float32
    num_pages: torch.Tensor  # [R] int32
    sink_pages: int  # first and last pages that are always read
    recent_pages: int

    @property
    def kept(self) -> torch.Tensor:
        """``[R, M * P]`` bool: the pages that are always read."""
        page, total = torch.arange(self.scores.shape[-1]), self.num_pages[:, None]
        return ((page < self.sink_pages) | (page >= total - self.recent_pages)) & (page < total)

    @property
    def beyond(self) -> torch.Tensor:
        """``[R, M * P]`` bool: pages that a row does not have."""
        return torch.arange(self.scores.shape[-1]) >= self.num_pages[:, None]


def page_masses(
    estimate: str,
    query: torch.Tensor,
    keys: torch.Tensor,
    block_table: torch.Tensor,
    page_size: int,
    scale: float,
    ranking: Ranking,
) -> torch.Tensor:
    """Estimated share of the softmax in every page, mean over the query heads, ``[R, H, M * P]``.

    The pages that are always read are estimated by their keys: those are read anyway.

    Args:
        estimate: One of `ESTIMATES`.
        query: ``[R, Hq, D]``.
        keys: ``[B, H, N, D]``, NaN where a page that is being filled has no key yet.
        block_table: ``[R, M]`` int32.
        page_size: Tokens per page.
        scale: Factor of q . k.
        ranking: Says which pages the rows have.
    """
    heads, parts, first = keys.shape[1], [], 0
    _, lengths = torch.unique_consecutive(block_table, dim=0, return_counts=True)
    for count in lengths.tolist():  # rows of one request
        part = slice(first, first + count)
        first += count
        context = keys[block_table[first - 1].long().clamp(min=0)].movedim(0, 1).flatten(1, 2).float()
        q = query[part].float().unflatten(1, (heads, -1)) * scale  # [r, H, G, D]
        unseen = context.isnan().any(-1)[None, :, None]  # [1, H, 1, M * N]
        logits = (q @ context.nan_to_num().mT).masked_fill(unseen, -torch.inf).unflatten(-1, (-1, page_size))
        beyond = ranking.beyond[part, None, None]
        exact = logits.logsumexp(-1).masked_fill(beyond, -torch.inf)  # [r, H, G, M * P]
        if estimate == "true mass":
            log_mass = exact
        else:
            kmin, kmax = _extremes(estimate, context.unflatten(1, (-1, page_size)))
            upper = q.clamp(min=0) @ kmax.mT + q.clamp(max=0) @ kmin.mT
            kept = ranking.kept[part, None, None]
            log_mass = exact.where(kept | beyond, upper + np.log(page_size))
        parts.append(torch.softmax(log_mass, -1).mean(2))
    return torch.cat(parts)


def pages_for(shares: np.ndarray, mass: torch.Tensor, ranking: Ranking) -> np.ndarray:
    """Pages that all rows and KV heads together read for each of `shares`, ascending in (0, 1)."""
    _, before, always = _ranked(mass, ranking)
    reached = before[~always & (before <= 1)].numpy()
    return int(always.sum()) + np.searchsorted(np.sort(reached), shares)


def choose(share: float, mass: torch.Tensor, ranking: Ranking) -> torch.Tensor:
    """The pages of best scores that together have `share` of the mass, ``[R, H, M * P]``; -1 elsewhere.

    Those that are always read come first.
    """
    order, before, always = _ranked(mass, ranking)
    taken = torch.zeros_like(always).scatter(-1, order, always | (before < share))
    return torch.arange(taken.shape[-1]).where(taken, -1).int()


def _ranked(mass: torch.Tensor, ranking: Ranking) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pages in the order in which they are taken, the mass before each, and which are always read."""
    kept, beyond = ranking.kept[:, None], ranking.beyond[:, None]
    scores = ranking.scores.masked_fill(beyond, -torch.inf).masked_fill(kept, torch.inf)
    order = scores.argsort(-1, descending=True)
    ranked = mass.gather(-1, order)
    before = (ranked.cumsum(-1) - ranked).masked_fill(beyond.expand_as(order).gather(-1, order), torch.inf)
    return order, before, kept.expand_as(order).gather(-1, order)


def _extremes(estimate: str, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """kmin and kmax, ``[H, M * P, D]`` each, of keys ``[H, M * P, S, D]``; the mean key as both."""
    if estimate == "bound":
        return keys.amin(2), keys.amax(2)
    return keys.mean(2), keys.mean(2)
