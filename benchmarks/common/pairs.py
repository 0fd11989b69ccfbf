"""The arithmetic of comparing two engines that were timed alternately."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Ratio:
    """One quantity of two contenders, divided pair by pair.

    A pair lies close together in time, so what slows the machine for a while slows both of it.

    Attributes:
        median: Of the pairs' ratios.
        low: The lowest of them.
        high: The highest of them.
        pairs: How many there are.
    """

    median: float
    low: float
    high: float
    pairs: int

    @classmethod
    def of(cls, numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
        """Divides the n-th of one by the n-th of the other.

        Raises:
            ValueError: No pair, or an entry without its partner.
        """
        ratios = [above / below for above, below in zip(numerators, denominators, strict=True)]
        if not ratios:
            raise ValueError("no pairs to compare")
        return cls(median(ratios), min(ratios), max(ratios), len(ratios))

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f}-{self.high:.2f})"


def first_context(holds: Callable[[int], bool], low: int, high: int, step: int) -> int:
    """The shortest context, in multiples of `step`, at which `holds`, found by bisection.

    Args:
        holds: Whether a context has a property that all longer ones have too.
        low: A context without it; is not asked.
        high: A context with it, a multiple of `step`; is not asked.
        step: In tokens.
    """
    if high % step:
        raise ValueError(f"high: {high}; allowed: a multiple of step, {step}")
    without, having = low // step, high // step
    while having - without > 1:
        middle = (without + having) // 2
        if holds(middle * step):
            having = middle
        else:
            without = middle
    return having * step
