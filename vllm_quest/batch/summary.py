"""What a batch came to: read back from the output files, so that it says what is there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import pyarrow.fs
import pyarrow.parquet as pq

from vllm_quest.batch.source import locate

RAY_NAME = re.compile("[0-9a-f]{32}_[0-9]{6}")  # id of the write, number of its task


class Totals(NamedTuple):
    """Sums over records.

    Attributes:
        rows: Records.
        errors: Those with an error.
        prompt_tokens: Of the answered rows.
        completion_tokens: Of the answered rows.
    """

    rows: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def plus(self, other: tuple[int, ...]) -> Totals:
        """The sums of both."""
        return Totals(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def minus(self, other: Totals) -> Totals:
        """What came on top of `other`."""
        return Totals(*(mine - theirs for mine, theirs in zip(self, other, strict=True)))


def checkpoint_path(output: str) -> str:
    """Where Ray Data notes the finished rows: beside the output, for Ray searches the output recursively."""
    return f"{output.rstrip('/')}.checkpoint"


def read_totals(output: str) -> Totals:
    """Sums over the finished files of an output folder; those that a killed run began do not count.

    Raises:
        RuntimeError: A row has two records.
    """
    totals, ids = Totals(), set()
    for filesystem, path in _finished_files(output):
        for id_, sums in _records(filesystem, path):
            totals = totals.plus(sums)
            ids.add(id_)
    if len(ids) != totals.rows:
        raise RuntimeError(f"{output}: {totals.rows - len(ids)} rows have more than one record")
    return totals


def remove_unfinished(output: str) -> None:
    """Removes files of records that nobody noted as finished: a task of a killed run may write one late."""
    filesystem, folder = locate(output)
    finished = {path for _, path in _finished_files(output)}
    for name, path in _files(filesystem, folder).items():
        if path not in finished and RAY_NAME.fullmatch(name):
            filesystem.delete_file(path)


def _finished_files(output: str) -> Iterator[tuple[pyarrow.fs.FileSystem, str]]:
    """Files whose rows Ray Data has noted as finished: it names both alike."""
    filesystem, folder = locate(output)
    finished = _files(*locate(checkpoint_path(output)))
    return (
        (filesystem, path) for name, path in sorted(_files(filesystem, folder).items()) if name in finished
    )


def _files(filesystem: pyarrow.fs.FileSystem, folder: str) -> dict[str, str]:
    """Paths by name without suffix."""
    files = filesystem.get_file_info(pyarrow.fs.FileSelector(folder, allow_not_found=True))
    return {file.base_name.rpartition(".")[0]: file.path for file in files if file.is_file}


def _records(filesystem: pyarrow.fs.FileSystem, path: str) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
    """Each record's id, and what it adds to the totals."""
    if path.endswith(".parquet"):
        columns = ["id", "error", "prompt_tokens", "completion_tokens"]
        with filesystem.open_input_file(path) as file:
            for one in pq.read_table(file, columns=columns).to_pylist():
                tokens = one["prompt_tokens"], one["completion_tokens"]
                yield one["id"], (1, int(one["error"] is not None), *tokens)
        return
    with filesystem.open_input_stream(path) as file:
        for line in file.read().splitlines():
            one = json.loads(line)
            usage = one["response"]["body"]["usage"] if one["response"] else {}
            tokens = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
            yield one["id"], (1, int(one["error"] is not None), *tokens)


@dataclass(frozen=True)
class Summary:
    """What a run did and what the output holds.

    Attributes:
        output: The folder.
        rows: Rows of the input; each has one record in the output.
        errors: Rows whose record is an error.
        prompt_tokens: Of all answered rows.
        completion_tokens: Of all answered rows.
        resumed_rows: Rows that an earlier run had finished.
        seconds: Wall time of this run, engines' start included.
        replicas: Engines.
        tokens_per_s_per_replica: Completion tokens of this run per second and replica.
        sparse_share: Share of this run's decode rows (query token x layer) that selected pages; None where
            the engines decoded nothing.
        read_share: Bytes that those rows read, as a share of what dense attention would have read.
        nodes: QUEST's counters of this run by node.
    """

    output: str
    rows: int
    errors: int
    prompt_tokens: int
    completion_tokens: int
    resumed_rows: int
    seconds: float
    replicas: int
    tokens_per_s_per_replica: float
    sparse_share: float | None
    read_share: float | None
    nodes: dict[str, dict[str, int]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        output: str,
        totals: Totals,
        before: Totals,
        seconds: float,
        replicas: int,
        nodes: dict[str, dict[str, int]],
    ) -> Summary:
        """From the totals of the output after and before the run, and the counters of each node."""
        counters = {key: sum(node[key] for node in nodes.values()) for key in next(iter(nodes.values()), {})}
        sparse = counters.get("decode_rows_sparse", 0)
        decoded = sum(value for key, value in counters.items() if key.startswith("decode_rows_"))
        return cls(
            output,
            *totals,
            resumed_rows=before.rows,
            seconds=round(seconds, 3),
            replicas=replicas,
            tokens_per_s_per_replica=round(totals.minus(before).completion_tokens / seconds / replicas, 3),
            sparse_share=round(sparse / decoded, 4) if decoded else None,
            read_share=round(counters["bytes_read"] / counters["bytes_dense"], 4) if sparse else None,
            nodes=nodes,
        )

    def as_json(self) -> dict[str, Any]:
        """The same for programs."""
        return asdict(self)

    def text(self) -> str:
        """The same for people."""
        resumed = f", {self.resumed_rows} of them finished by an earlier run" if self.resumed_rows else ""
        lines = [
            f"rows    {self.rows}, {self.errors} with an error{resumed}",
            f"tokens  {self.prompt_tokens} in, {self.completion_tokens} out",
            f"time    {self.seconds:.1f} s, start of the engines included; "
            f"{self.tokens_per_s_per_replica:.1f} tokens/s per replica ({self.replicas})",
            f"sparse  {_percent(self.sparse_share)} of decode rows, "
            f"which read {_percent(self.read_share)} of the bytes",
            *(
                f"node    {node}: {counters['decode_rows_sparse']} sparse decode rows"
                for node, counters in self.nodes.items()
            ),
            f"output  {self.output}",
        ]
        return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{100 * share:.1f} %"
