"""What pictures of results share (extra ``plot``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure


@contextmanager
def two_panels(path: Path) -> Iterator[tuple[Axes, Axes]]:
    """Two axes, next to each other; what is drawn within it is written to `path`."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    yield left, right
    for axes in (left, right):
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130)


def label_contexts(axes: Axes, contexts: Sequence[int]) -> None:
    """Ticks of an axis of contexts, in tokens: 1024 is 1k, 1048576 is 1M."""
    axes.set_xticks(contexts, [_short(context) for context in contexts], minor=False)
    axes.set_xticks([], minor=True)


def _short(tokens: int) -> str:
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if tokens >= size:
            return f"{tokens / size:g}{unit}"
    return str(tokens)
