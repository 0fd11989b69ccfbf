"""Files of results: JSON that is written whole, JSON lines that grow, and rows that a run continues from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Writes `value` for people to read, too; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def read_lines(path: Path) -> list[Any]:
    """The values of a file of JSON lines, none if there is no file.

    A last line that an interruption cut off is removed from the file.
    """
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def append_line(path: Path, value: Any) -> None:
    """Adds a JSON line, on disk before this returns; makes file and folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(value) + "\n")


class ResultsError(RuntimeError):
    """The file belongs to another measurement; says what differs."""


class ResultsFile:
    """Rows under the description of their measurement, in a JSON file that the same measurement continues.

    Attributes:
        rows: Everything measured so far, earlier runs of the same measurement included.
    """

    def __init__(self, path: Path | None, about: dict[str, Any], keys: tuple[str, ...]) -> None:
        """Reads `path` if it is there.

        Args:
            path: None keeps the rows in memory only.
            about: Machine, versions and settings. ``command`` and ``date`` may differ between the runs of one
                measurement; the file has the last ones.
            keys: What names a row.

        Raises:
            ResultsError: `path` has rows of other settings, of another machine, or of other versions.
        """
        self.path, self.about, self.keys = path, json.loads(json.dumps(about)), keys
        self.rows: list[dict[str, Any]] = []
        if path and path.exists():
            earlier = json.loads(path.read_text())
            for name in self.about.keys() - {"command", "date"}:
                if earlier["about"].get(name) != self.about[name]:
                    raise ResultsError(
                        f"--json: {path} was measured with {name}={earlier['about'].get(name)}, this run has "
                        f"{self.about[name]}; name another file, or remove it"
                    )
            self.rows = earlier["rows"]

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The row of this key, if it was measured."""
        return next((row for row in self.rows if all(row.get(k) == key[k] for k in self.keys)), None)

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row and writes the file."""
        missing = [key for key in self.keys if key not in row]
        if missing:
            raise ValueError(f"a row without {', '.join(missing)}: {row}")
        self.rows.append(json.loads(json.dumps(row)))
        if self.path:
            write_json(self.path, {"about": self.about, "rows": self.rows})
