"""What is derived from times on a GPU, and its picture; the times here are made up."""

from __future__ import annotations

import math

import pytest

from benchmarks.kernels_report import break_even, series, summary


def row(context: int, speed_up: float, page_size: int = 16, metadata_dtype: str = "auto") -> dict:
    return {
        **{"geometry": "llama-3.1-8b", "batch": 8, "context": context, "token_budget": 2048},
        **{"page_size": page_size, "kv_dtype": "auto", "metadata_dtype": metadata_dtype, "layers": 2},
        **{"milliseconds": {"QUEST": 1.0, "FLASH_ATTN": speed_up}, "left_out": {"FLASHINFER": "not there"}},
        **{"speed_up": speed_up, "speed_up_limit": 8.0, "gb_per_s": 2000.0, "share_of_limit": 0.7},
    }


ROWS = [row(8192, 1.2), row(2048, 1.1), row(4096, 0.9), row(32768, 5.0)]


@pytest.mark.parametrize(
    ("rows", "context"), [(ROWS, 8192), (ROWS[2:3], None), ([row(4096, 2.0), row(8192, math.nan)], None)]
)
def test_quest_wins_from_a_context_on(rows, context) -> None:
    """A win below a loss is no break-even."""
    assert break_even(rows) == context


def test_the_summary_names_where_it_loses() -> None:
    text = summary([*ROWS, row(4096, 0.5, metadata_dtype="int8")])
    assert "budget 2048, page 16  " in text
    assert "page 16, int8 bounds" in text
    assert "nowhere measured" in text
    worst = text.split("worst: ")[1]
    assert "0.50x" in worst
    assert "no FLASHINFER: not there" in worst


def test_the_picture_is_drawn(tmp_path) -> None:
    plots = pytest.importorskip("benchmarks.plots", reason="needs the extra 'plot'")
    path = tmp_path / "kernels.png"
    plots.plot_kernels(series(ROWS), path)
    assert path.read_bytes().startswith(b"\x89PNG")
