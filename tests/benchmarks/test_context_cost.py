"""What is derived from the timings of a step, and its picture."""

from __future__ import annotations

import pytest

from benchmarks.kernels.context_cost import first_where_scoring_exceeds, report


def row(context: int, score: float, page_size: int = 16) -> dict:
    return {
        **{
            "page_size": page_size,
            "bounds_dtype": "auto",
            "context": context,
            "dense_ms": 8.0,
            "quest_ms": score + 1.0,
        },
        **{"dense_limit_ms": 4.0, "quest_limit_ms": 1.0, "ratio": {"median": 2.0, "p10": 1.9, "p90": 2.1}},
        "parts_ms": {"store": 0.2, "score": score, "select": 0.3, "attend": 0.5},
    }


ROWS = [row(1024, 0.1), row(2048, 1.5), row(4096, 0.9), row(8192, 1.1), row(16384, 4.0)]


@pytest.mark.parametrize(("share", "context"), [(0.5, 8192), (0.75, 16384), (0.9, None), (0.05, 1024)])
def test_scoring_dominates_from_a_context_on(share, context) -> None:
    """At 2048 it takes more than half, but not at 4096: one outlier is no beginning."""
    assert first_where_scoring_exceeds(ROWS, share) == context


def test_the_report_has_every_row() -> None:
    text = report([*ROWS, row(1024, 9.0, page_size=8)])
    assert text.count("2.00x") == len(ROWS) + 1
    assert (
        "16-token pages, bounds auto: scoring takes more than a quarter of the step from 2,048 tokens on"
        in text
    )
    assert "50 %" in text


def test_the_picture_is_drawn(tmp_path) -> None:
    plots = pytest.importorskip("benchmarks.kernels.plots", reason="needs the extra 'plot'")
    path = tmp_path / "cost.png"
    plots.plot_context_cost(ROWS, path)
    assert path.read_bytes().startswith(b"\x89PNG")
