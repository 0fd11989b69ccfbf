"""FlexGen's format, simulated: 16 values per group, and rounding again changes nothing."""

from __future__ import annotations

import pytest
import torch

from benchmarks.accuracy.flexgen import GROUP, rounded

FINITE_EXTREMES = [0.0, -0.0, 3e38, -3e38, 1e-30]


@pytest.mark.parametrize("dim", [64, 128])
def test_a_group_has_sixteen_values_between_its_extremes(dim) -> None:
    values = torch.randn(7, 3, dim, generator=torch.Generator().manual_seed(0))
    stored = rounded(values)
    for group, exact in zip(stored.split(GROUP, -1), values.split(GROUP, -1), strict=True):
        step = (exact.amax(-1) - exact.amin(-1)) / 15
        assert ((group - exact).abs() <= 0.501 * step[..., None]).all()
        assert max(len(row.unique()) for row in group.flatten(0, 1)) <= 16
        torch.testing.assert_close(group.amin(-1), exact.amin(-1))
    torch.testing.assert_close(rounded(stored), stored)


@pytest.mark.parametrize("value", FINITE_EXTREMES)
def test_a_constant_group_is_kept(value) -> None:
    values = torch.full((2, 64), value)
    torch.testing.assert_close(rounded(values), values)
