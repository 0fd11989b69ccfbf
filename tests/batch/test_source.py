"""Input files and their rows, without a cluster."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from vllm_quest.batch.source import READ_BYTES, RowSource, chunks, locate


def rows(path: Path, chunk_rows: int) -> list[dict]:
    """All rows, read chunk by chunk as the tasks of Ray Data do."""
    cut = list(chunks(str(path), chunk_rows))
    tasks = RowSource(str(path), cut).get_read_tasks(parallelism=1)
    blocks = [block for task in tasks for block in task()]
    assert [block.num_rows for block in blocks] == [chunk.num_rows for chunk in cut]
    assert all(0 < block.num_rows <= chunk_rows for block in blocks)
    return [row for block in blocks for row in block.to_pylist()]


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 100])
@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n  \n"])
def test_lines_keep_their_numbers(tmp_path, chunk_rows, end) -> None:
    lines = [b"a", b"", b"bb\r", b"  ", b'{"c": "\xc3\xa4"}', b"d", b"", b"e"]
    assert_numbered(tmp_path / "in.jsonl", lines, end, chunk_rows)


@pytest.mark.parametrize("beyond", range(-3, 4))
def test_a_line_may_end_anywhere_in_what_is_read_at_once(tmp_path, beyond) -> None:
    """Files are read in pieces; a piece ends before, in or behind a newline."""
    lines = [b"a", b"x" * (READ_BYTES - 3 + beyond), b"", b"bb", b"y" * READ_BYTES, b"c"]
    assert_numbered(tmp_path / "in.jsonl", lines, b"\n", 2)


def assert_numbered(path: Path, lines: list[bytes], end: bytes, chunk_rows: int) -> None:
    path.write_bytes(b"\n".join(lines) + end)
    found = rows(path, chunk_rows)
    wanted = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    assert [row["place"] for row in found] == [f"in.jsonl:{number}" for number, _ in wanted]
    assert all(row["line"] == line for row, (_, line) in zip(found, wanted, strict=True))
    assert [row["row"] for row in found] == list(range(len(wanted)))


def test_an_empty_file_has_no_rows(tmp_path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"\n\n")
    assert rows(tmp_path / "in.jsonl", 4) == []


@pytest.mark.parametrize("chunk_rows", [1, 2, 100])
def test_parquet(tmp_path, chunk_rows) -> None:
    table = [
        {"custom_id": "a", "messages": [{"role": "user", "content": "x", "name": None}], "seed": None},
        {"custom_id": None, "messages": [{"role": "user", "content": "y", "name": "z"}], "seed": 3},
        {"custom_id": "c", "messages": None, "seed": None},
    ]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "in.parquet", row_group_size=2)
    found = rows(tmp_path / "in.parquet", chunk_rows)
    assert [row["row"] for row in found] == [0, 1, 2]
    assert [row["place"] for row in found] == ["in.parquet:1", "in.parquet:2", "in.parquet:3"]
    assert [json.loads(row["line"]) for row in found] == [
        {"custom_id": "a", "messages": [{"role": "user", "content": "x"}]},
        {"messages": [{"role": "user", "content": "y", "name": "z"}], "seed": 3},
        {"custom_id": "c"},
    ]


def test_a_folder_counts_its_rows_through(tmp_path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.jsonl").write_bytes(b"1\n2\n")
    (tmp_path / "sub" / "b.jsonl").write_bytes(b"3")
    (tmp_path / "ignored.txt").write_bytes(b"4")
    found = rows(tmp_path, 10)
    assert [(row["row"], row["place"]) for row in found] == [
        (0, "a.jsonl:1"),
        (1, "a.jsonl:2"),
        (2, "sub/b.jsonl:1"),
    ]


def test_what_cannot_be_read(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such file"):
        list(chunks(str(tmp_path / "none.jsonl"), 1))
    with pytest.raises(FileNotFoundError, match=r"without \.jsonl or \.parquet"):
        list(chunks(str(tmp_path), 1))
    (tmp_path / "a.csv").touch()
    with pytest.raises(ValueError, match=r"must end in \.jsonl or \.parquet"):
        list(chunks(str(tmp_path / "a.csv"), 1))
    with pytest.raises(ValueError, match="gopher"):
        list(chunks("gopher://host/a.jsonl", 1))


def test_a_uri(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"1\n")
    filesystem, path = locate(f"file://{tmp_path}/a.jsonl")
    assert isinstance(filesystem, pyarrow.fs.LocalFileSystem)
    assert path == f"{tmp_path}/a.jsonl"
    assert len(list(chunks(f"file://{tmp_path}/a.jsonl", 1))) == 1
