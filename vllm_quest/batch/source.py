"""Input files -> rows, as a data source of Ray Data: each row with its index and its place.

A chunk of the input is one read task, and stays one block down to its output file: the unit that a worker
takes, and that is done again when a worker dies.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

SUFFIXES = (".jsonl", ".parquet")
SCHEMA = pa.schema([("row", pa.int64()), ("place", pa.string()), ("line", pa.binary())])
READ_BYTES = 1 << 24


def locate(path: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The file system of `path`, a local path or a URI such as ``s3://bucket/key``, and its path there.

    Raises:
        ValueError: pyarrow does not know the scheme.
    """
    from pathlib import Path

    if "://" not in path:
        return pyarrow.fs.LocalFileSystem(), str(Path(path).absolute())
    try:
        return pyarrow.fs.FileSystem.from_uri(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: {error}") from None


@dataclass(frozen=True)
class Chunk:
    """Rows that lie beside each other in one file.

    Attributes:
        path: The file, on the input's file system.
        name: The file as places of rows name it.
        first_row: Index of the first row among all rows of the input.
        num_rows: Rows; blank lines of JSONL are none.
        first_line: Number of the first line, or of the first row of a Parquet file; both from 1.
        start: First byte; of a Parquet file, the first row in the row group.
        length: Bytes; of a Parquet file, rows.
        row_group: Of a Parquet file.
    """

    path: str
    name: str
    first_row: int
    num_rows: int
    first_line: int
    start: int
    length: int
    row_group: int = 0

    def read(self, filesystem: pyarrow.fs.FileSystem) -> list[pa.Table]:
        """The chunk as one block of `SCHEMA`."""
        lines = self._parquet_rows if self.path.endswith(".parquet") else self._lines
        rows = list(lines(filesystem))
        return [
            pa.table(
                [
                    range(self.first_row, self.first_row + len(rows)),
                    [f"{self.name}:{number}" for number, _ in rows],
                    [line for _, line in rows],
                ],
                schema=SCHEMA,
            )
        ]

    def _lines(self, filesystem: pyarrow.fs.FileSystem) -> Iterator[tuple[int, bytes]]:
        with filesystem.open_input_file(self.path) as file:
            file.seek(self.start)
            text = file.read(self.length)
        for number, line in enumerate(text.removesuffix(b"\n").split(b"\n"), start=self.first_line):
            if line.strip():
                yield number, line

    def _parquet_rows(self, filesystem: pyarrow.fs.FileSystem) -> Iterator[tuple[int, bytes]]:
        with filesystem.open_input_file(self.path) as file:
            table = pq.ParquetFile(file).read_row_group(self.row_group).slice(self.start, self.length)
        for number, row in enumerate(table.to_pylist(), start=self.first_line):
            yield number, json.dumps(_without_nulls(row), default=str).encode()


def _without_nulls(value: Any) -> Any:
    """Arrow gives every row all fields of all rows; those that a row does not have are null."""
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value


def chunks(path: str, chunk_rows: int) -> Iterator[Chunk]:
    """Cuts the input, one file or all ``.jsonl`` and ``.parquet`` files of a folder, into chunks.

    Args:
        path: Local, or a URI.
        chunk_rows: Rows of a chunk, at most.

    Raises:
        FileNotFoundError: There is no such file, or nothing to read in the folder.
        ValueError: The file is neither JSONL nor Parquet.
    """
    filesystem, root = locate(path)
    info = filesystem.get_file_info(root)
    files = [root]
    if info.type == pyarrow.fs.FileType.Directory:
        inside = filesystem.get_file_info(pyarrow.fs.FileSelector(root, recursive=True))
        files = sorted(file.path for file in inside if file.path.endswith(SUFFIXES))
    if info.type == pyarrow.fs.FileType.NotFound or not files:
        raise FileNotFoundError(f"input {path}: no such file, or a folder without .jsonl or .parquet files")
    row = 0
    for file in files:
        if not file.endswith(SUFFIXES):
            raise ValueError(f"input {file}: the name must end in {' or '.join(SUFFIXES)}")
        name = file.removeprefix(root).lstrip("/") or file.rpartition("/")[2]
        cut = _cut_parquet if file.endswith(".parquet") else _cut_lines
        for chunk in cut(filesystem, file, name, row, chunk_rows):
            row += chunk.num_rows
            yield chunk


def _cut_lines(
    filesystem: pyarrow.fs.FileSystem, path: str, name: str, first_row: int, chunk_rows: int
) -> Iterator[Chunk]:
    start = end = rows = 0
    first_line = line = 1
    with filesystem.open_input_stream(path) as file:
        rest = b""
        while data := file.read(READ_BYTES):
            *whole, rest = (rest + data).split(b"\n")
            for text in whole:
                end += len(text) + 1
                line += 1
                rows += bool(text.strip())
                if rows == chunk_rows:
                    yield Chunk(path, name, first_row, rows, first_line, start, end - start)
                    first_row, first_line, start, rows = first_row + rows, line, end, 0
    end += len(rest)
    rows += bool(rest.strip())
    if rows:
        yield Chunk(path, name, first_row, rows, first_line, start, end - start)


def _cut_parquet(
    filesystem: pyarrow.fs.FileSystem, path: str, name: str, first_row: int, chunk_rows: int
) -> Iterator[Chunk]:
    with filesystem.open_input_file(path) as file:
        metadata = pq.ParquetFile(file).metadata
    line = 1
    for group in range(metadata.num_row_groups):
        group_rows = metadata.row_group(group).num_rows
        for start in range(0, group_rows, chunk_rows):
            rows = min(chunk_rows, group_rows - start)
            yield Chunk(path, name, first_row, rows, line, start, rows, group)
            first_row, line = first_row + rows, line + rows


class RowSource(Datasource):
    """The rows of `chunks` as a data source of Ray Data.

    Args:
        path: The input, as `chunks` takes it.
        chunks: Its chunks.
    """

    def __init__(self, path: str, chunks: list[Chunk]) -> None:
        super().__init__()
        self._filesystem, _ = locate(path)
        self._chunks = chunks

    def get_name(self) -> str:
        """The name in Ray's logs."""
        return "Rows"

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all chunks."""
        return sum(chunk.length for chunk in self._chunks)

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """One per chunk, whatever `parallelism` says."""
        return [
            ReadTask(
                partial(chunk.read, self._filesystem),
                BlockMetadata(chunk.num_rows, chunk.length, input_files=(chunk.path,), exec_stats=None),
                schema=SCHEMA,
            )
            for chunk in self._chunks
        ]
