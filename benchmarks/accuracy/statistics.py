"""Intervals of 95 %: Wilson's for shares, the bootstrap for means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

__all__ = ["Interval", "bootstrap", "wilson"]

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

    def text(self, form: str, scale: float = 1, mark: str = "") -> str:
        """``value [low, high]``, each times `scale` and formatted by `form`; `mark` around the value."""
        value, low, high = (format(scale * end, form) for end in self)
        return f"{mark}{value}{mark} [{low}, {high}]"


def wilson(hits: int, count: int) -> Interval:
    """Share of `hits` among `count` trials, at least one, with Wilson's interval."""
    low, high = stats.binomtest(hits, count).proportion_ci(method="wilson")
    return Interval(hits / count, float(low), float(high))


def bootstrap(strata: Sequence[Sequence[float]]) -> Interval:
    """Mean over strata of each stratum's mean, with the percentile interval of resampling within strata.

    Args:
        strata: Values of the samples of each task, at least one each. Differences to another configuration
            of the same samples make it paired.
    """
    # scipy refuses a single value; twice the same is the same distribution.
    samples = [values if len(values) > 1 else [*values, *values] for values in strata]
    found = stats.bootstrap(samples, _mean_of_means, n_resamples=RESAMPLES, method="percentile", rng=0)
    low, high = found.confidence_interval
    return Interval(float(_mean_of_means(*samples)), float(low), float(high))


def _mean_of_means(*samples: Any, axis: int = -1) -> Any:
    return sum(np.mean(values, axis) for values in samples) / len(samples)
