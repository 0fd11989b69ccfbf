"""Ratios and the search for a break-even context, without timing anything."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.common.pairs import Ratio, first_context


def test_a_ratio_is_taken_pair_by_pair() -> None:
    """The machine slows down by 10 within the run, both sides alike: the ratio does not move."""
    ratio = Ratio.of([3.0, 0.3, 30.0], [2.0, 0.2, 20.0])
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((1.5, 1.5, 1.5))
    assert ratio.pairs == 3


def test_a_ratio_shows_its_spread() -> None:
    assert str(Ratio.of([1.0, 2.0, 4.0], [1.0, 1.0, 1.0])) == "2.00x (1.00-4.00)"


@pytest.mark.parametrize("sides", [([], []), ([1.0], []), ([1.0], [1.0, 2.0])])
def test_a_ratio_needs_pairs(sides) -> None:
    with pytest.raises(ValueError, match=r"no pairs|argument"):
        Ratio.of(*sides)


@given(st.integers(1, 64), st.integers(1, 500), st.integers(0, 499), st.integers(0, 63))
def test_the_search_finds_the_first_context(step, high, first, offset) -> None:
    """Against a scan, for a property that begins anywhere between `low` and `high`."""
    first = min(first + 1, high)
    low = max((first - 1) * step - offset, 0)
    asked: list[int] = []

    def holds(context: int) -> bool:
        asked.append(context)
        return context >= first * step

    assert first_context(holds, low, high * step, step) == first * step
    assert len(asked) <= high.bit_length()
    assert all(context % step == 0 and low < context < high * step for context in asked)


def test_the_search_wants_whole_steps() -> None:
    with pytest.raises(ValueError, match="high: 100"):
        first_context(lambda context: True, 0, 100, 16)
