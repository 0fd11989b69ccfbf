"""Formats that others have, simulated; vLLM's own kernels meet `int4_per_token_head` in `test_kernels.py`."""

from __future__ import annotations

import pytest
import torch

from benchmarks.accuracy.studies.formats import FLEXGEN_GROUP, flexgen, int4_per_token_head

FINITE_EXTREMES = [0.0, -0.0, 3e38, -3e38, 1e-30]


def random_values(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dim", [64, 128])
def test_a_group_of_flexgen_has_sixteen_values_between_its_extremes(dim) -> None:
    values = random_values(7, 3, dim)
    stored = flexgen(values)
    for group, exact in zip(stored.split(FLEXGEN_GROUP, -1), values.split(FLEXGEN_GROUP, -1), strict=True):
        step = (exact.amax(-1) - exact.amin(-1)) / 15
        assert ((group - exact).abs() <= 0.501 * step[..., None]).all()
        assert max(len(row.unique()) for row in group.flatten(0, 1)) <= 16
        torch.testing.assert_close(group.amin(-1), exact.amin(-1))
    torch.testing.assert_close(flexgen(stored), stored)


@pytest.mark.parametrize("value", FINITE_EXTREMES)
def test_flexgen_keeps_a_constant_group(value) -> None:
    values = torch.full((2, 64), value)
    torch.testing.assert_close(flexgen(values), values)


@pytest.mark.parametrize("dim", [64, 96, 128])
def test_int4_per_token_head_has_sixteen_values_with_zero_among_the_rotated_channels(dim) -> None:
    values = random_values(7, 3, dim)
    stored = int4_per_token_head(values)
    # A normal vector's range is about five deviations: a fifteenth of it, squared, over twelve is 0.01.
    assert (stored - values).square().mean() < 0.02 * values.square().mean()
    torch.testing.assert_close(int4_per_token_head(stored), stored)
    block = dim & -dim  # channels that are rotated together
    for row in (stored.unflatten(-1, (-1, block)) @ rotation(block)).flatten(0, 1).flatten(1):
        assert len(distinct(row)) <= 16
        assert row.abs().min() < 1e-4


def rotation(size: int) -> torch.Tensor:
    """vLLM's, by what it makes of unit vectors: ``[size, size]``, orthonormal."""
    from vllm.v1.attention.ops.int4_per_token_head import single_rht

    matrix = single_rht(torch.eye(size)) / size**0.5
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size))
    return matrix


def distinct(row: torch.Tensor) -> list[float]:
    """Values of `row` that are further apart than float32's rounding."""
    found: list[float] = []
    for value in row.sort().values.tolist():
        if not found or value - found[-1] > 1e-4:
            found.append(value)
    return found


@pytest.mark.parametrize("value", [0.0, 1e30, 1e-30])
def test_int4_per_token_head_makes_finite_values_of_constants(value) -> None:
    assert int4_per_token_head(torch.full((2, 64), value)).isfinite().all()
