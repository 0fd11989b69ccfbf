"""Intervals of 95 %: Wilson's for shares, the bootstrap for means."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

import numpy as np

__all__ = ["Interval", "bootstrap", "wilson"]

Z = 1.959964  # of the normal distribution, two-sided 95 %
RESAMPLES = 2_000


class Interval(NamedTuple):
    """An estimate and its 95 % interval.

    Attributes:
        value: The estimate.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    @property
    def is_below(self) -> bool:
        """Whether all of it lies below zero."""
        return self.high < 0

    @property
    def is_above(self) -> bool:
        """Whether all of it lies above zero."""
        return self.low > 0


def wilson(hits: int, count: int) -> Interval:
    """Share of `hits` among `count` trials, at least one, with Wilson's interval."""
    share = hits / count
    centre = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return Interval(share, min(share, centre - half), max(share, centre + half))


def bootstrap(strata: Sequence[Sequence[float]]) -> Interval:
    """Mean over strata of each stratum's mean, with the percentile interval of resampling within strata.

    Args:
        strata: Values of the samples of each task, at least one each. Differences to another configuration
            of the same samples make it paired.
    """
    generator = np.random.default_rng(0)
    means = np.zeros(RESAMPLES)
    for values in strata:
        array = np.asarray(values, dtype=float)
        drawn = generator.integers(len(array), size=(RESAMPLES, len(array)))
        means += array[drawn].mean(axis=1) / len(strata)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(np.mean([np.mean(values) for values in strata])), float(low), float(high))
