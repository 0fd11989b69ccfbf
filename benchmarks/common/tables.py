"""Tables as text: aligned for a terminal, or Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tabulate import tabulate


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of cells, the first column to the left, the others to the right."""
    alignment = ["left", *["right"] * (len(columns) - 1)]
    # Titles as a row: as headers they would be two blanks wider.
    return tabulate([columns, *rows], tablefmt="plain", colalign=alignment, disable_numparse=True)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The same as Markdown."""
    # Not by tabulate: it makes every cell as wide as the widest of its column.
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, *rows)]
    return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])
