"""How far a configuration is from dense attention, position by position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from vllm_quest.tune.instrument import Position

__all__ = ["Comparison", "compare", "kl_over_top", "nll"]


@dataclass(frozen=True)
class Comparison:
    """The tokens of one answer, as a configuration decoded them beside dense attention.

    Attributes:
        nll: Mean negative log-likelihood, nat per token.
        exact: Every token is the argmax.
        agreement: Share of positions where the argmax is the dense one.
        kl: Mean of `kl_over_top`, nat.
    """

    nll: float
    exact: bool
    agreement: float
    kl: float


def compare(dense: Sequence[Position], positions: Sequence[Position]) -> Comparison:
    """Compares the same tokens, decoded both ways; at least one."""
    pairs = list(zip(dense, positions, strict=True))
    return Comparison(
        nll=nll(positions),
        exact=all(position.top[position.argmax] == position.logprob for position in positions),
        agreement=fmean(one.argmax == other.argmax for one, other in pairs),
        kl=fmean(kl_over_top(one, other) for one, other in pairs),
    )


def nll(positions: Sequence[Position]) -> float:
    """Mean negative log-likelihood of the tokens, nat."""
    return -fmean(position.logprob for position in positions)


def kl_over_top(dense: Position, other: Position) -> float:
    """KL(dense || other) of the next token, nat, over the tokens that both returned, all others as one.

    Putting tokens together never raises a KL, so this is at most the whole one.
    """
    shared = dense.top.keys() & other.top.keys()
    p = [math.exp(dense.top[token]) for token in shared]
    q = [math.exp(other.top[token]) for token in shared]
    p.append(max(1 - math.fsum(p), 0.0))
    q.append(max(1 - math.fsum(q), 1e-12))
    return max(math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0), 0.0)
