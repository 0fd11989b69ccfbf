"""One run of a batch, from the input to the summary."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from vllm_quest.batch import cluster, pipeline
from vllm_quest.batch.pipeline import Batch
from vllm_quest.batch.progress import Tally, progress_bar
from vllm_quest.batch.source import Chunk, chunks, locate
from vllm_quest.batch.summary import Summary, Totals, read_totals, remove_unfinished

RUN_FILE, SUMMARY_FILE = "run.json", "summary.json"


class JobError(RuntimeError):
    """The batch cannot run, or did not come to its end."""


def run(batch: Batch, address: str | None, verbose: bool = False) -> Summary:
    """Answers all rows that have no record yet, and writes ``run.json`` and ``summary.json`` into the output.

    Args:
        batch: What to run.
        address: Of a running Ray cluster; None starts one on this machine.
        verbose: Prints what Ray and the engines log.

    Raises:
        JobError: The output belongs to another batch, the engines need GPUs, or rows are missing at the end.
        ClusterError: The cluster cannot run it.
        OSError, ValueError: The input cannot be read.
    """
    cut = list(chunks(batch.input, batch.chunk_rows))
    rows = sum(chunk.num_rows for chunk in cut)
    before, start = read_totals(batch.output), time.monotonic()
    _claim(batch, cut, before)
    nodes = _answer(batch, address, cut, before, verbose) if before.rows < rows else {}
    remove_unfinished(batch.output)
    totals = read_totals(batch.output)
    if totals.rows != rows:
        raise JobError(f"{rows - totals.rows} of {rows} rows have no record; run the same command again")
    summary = Summary.of(batch.output, totals, before, time.monotonic() - start, batch.replicas, nodes)
    _write(batch.output, SUMMARY_FILE, summary.as_json())
    return summary


def _answer(
    batch: Batch, address: str | None, cut: list[Chunk], before: Totals, verbose: bool
) -> dict[str, dict[str, int]]:
    """Runs the engines; returns QUEST's counters by node."""
    name = hashlib.sha256(batch.output.encode()).hexdigest()[:16]
    counters = str(Path(tempfile.gettempdir()) / f"vllm-quest-batch-{name}")
    with cluster.connected(address, counters, verbose):
        bundle = batch.bundle(cluster.has_gpus())
        if batch.workers > 1 and "GPU" not in bundle:
            raise JobError(
                "--tensor-parallel-size, --pipeline-parallel-size: above 1 the cluster must have GPUs"
            )
        cluster.check_room(bundle, batch.replicas, batch.workers)
        cluster.check_nodes(batch.model, bundle)
        tally = Tally.start()
        with progress_bar(tally, sum(chunk.num_rows for chunk in cut), before):
            pipeline.run(batch, cut, bundle, tally)
        return cluster.take_counters()


def _claim(batch: Batch, cut: list[Chunk], before: Totals) -> None:
    """Notes in the output what runs there; refuses an output that holds records of something else."""
    run = {
        "input": batch.input,
        "input_rows": sum(chunk.num_rows for chunk in cut),
        "input_bytes": sum(chunk.length for chunk in cut),
        "model": batch.model,
        "served_model_name": batch.model_name,
        "engine": batch.engine,
        "sampling": batch.sampling,
        "format": batch.file_format,
    }
    filesystem, folder = locate(batch.output)
    if before.rows:
        with filesystem.open_input_stream(f"{folder}/{RUN_FILE}") as file:
            earlier = json.loads(file.read())
        if differ := [key for key in run if earlier.get(key) != run[key]]:
            raise JobError(
                f"output {batch.output} holds records of another batch, with other {', '.join(differ)}; "
                "choose another folder"
            )
    _write(batch.output, RUN_FILE, run)


def _write(output: str, name: str, content: dict[str, Any]) -> None:
    filesystem, folder = locate(output)
    filesystem.create_dir(folder, recursive=True)
    with filesystem.open_output_stream(f"{folder}/{name}") as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")
