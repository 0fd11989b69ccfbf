"""``vllm-quest batch``: the command line."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from vllm_quest.config import QuestConfig
from vllm_quest.registration import BACKEND_NAME

if TYPE_CHECKING:
    from vllm_quest.batch.pipeline import Batch

DESCRIPTION = """\
Answers every row of a file of prompts with vLLM and QUEST, on this machine or on a Ray cluster.

Each row of the input gets exactly one record in the output; a bad row gets a record with an error. The same
command, run again after it was stopped or killed, goes on where it stopped.
"""
EPILOG = """\
rows (JSONL or Parquet; one object per line or row):
  {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}}
  {"custom_id": "b", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
  {"custom_id": "c", "prompt": "Once upon a time", "max_tokens": 64}

on this machine, two engines:
  vllm-quest batch prompts.jsonl out/ --model MODEL --replicas 2 --quest '{"token_budget": 2048}'
on a cluster, eight engines of four GPUs each:
  vllm-quest batch s3://bucket/prompts s3://bucket/out --model MODEL --address auto --replicas 8 \\
      --tensor-parallel-size 4 --sampling '{"max_tokens": 256}'
"""


def main(arguments: list[str]) -> int:
    """Runs the batch that `arguments` describe; returns the exit status."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if options.address is None:
        # Ray's name for: this cluster has one machine. Its processes then listen on loopback only.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    try:
        import ray.data
    except ImportError as error:
        return _fail(f"Ray is missing ({error}): pip install 'vllm-quest[ray]'")
    from vllm_quest.batch import job

    try:
        print(job.run(_batch(options), options.address, options.verbose).text())
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on where this one stopped")
    except ray.exceptions.RayError as error:
        *_, reason = str(error).strip().splitlines()
        return _fail(f"{reason}\n(--verbose prints what the engines log, also before this error)")
    except (ValueError, OSError, RuntimeError) as error:
        return _fail(str(error))
    return 0


def _fail(message: str) -> int:
    print(f"vllm-quest batch: {message}", file=sys.stderr)
    return 1


def _batch(options: argparse.Namespace) -> Batch:
    """The batch that the command line describes.

    Raises:
        ValueError: An option is wrong; names it.
    """
    from vllm_quest.batch import rows
    from vllm_quest.batch.pipeline import Batch

    try:
        QuestConfig.from_dict(options.quest)
    except ValueError as error:
        raise ValueError(f"--quest: {error}") from None
    try:
        sampling = rows.sampling_fields(options.sampling)
        rows.sampling_params(sampling)
    except rows.RowError as error:
        raise ValueError(f"--sampling: {error}") from None
    engine = {"attention_backend": BACKEND_NAME, "additional_config": {"quest": options.quest}}
    if options.kv_cache_dtype:
        engine["kv_cache_dtype"] = options.kv_cache_dtype
    return Batch(
        input=_everywhere(options.input),
        output=_everywhere(options.output).rstrip("/"),
        model=_everywhere(options.model) if os.path.exists(options.model) else options.model,
        model_name=options.served_model_name or options.model,
        replicas=options.replicas,
        tensor_parallel_size=options.tensor_parallel_size,
        pipeline_parallel_size=options.pipeline_parallel_size,
        engine=engine | {"disable_log_stats": True} | options.engine,
        sampling=sampling,
        chunk_rows=options.batch_size,
        file_format=options.format,
        cpus_per_worker=options.cpus_per_worker,
    )


def _everywhere(path: str) -> str:
    """The path as a worker understands it, whose folder is another."""
    return path if "://" in path else os.path.abspath(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-quest batch",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "input", help="JSONL or Parquet: a file, or a folder of them; local, or a URI such as s3://bucket/key"
    )
    add("output", help="folder for the records and summary.json; local, or a URI")
    add("--model", required=True, help="folder or name of the model; a folder must be on every node")
    add("--served-model-name", metavar="NAME", help="what rows may call the model; default: as --model")
    add("--format", choices=("jsonl", "parquet"), default="jsonl", help="of the output; default: jsonl")
    add("--sampling", type=_mapping, default={}, metavar="JSON", help="for rows that do not say otherwise")

    engines = parser.add_argument_group("engines").add_argument
    engines("--replicas", type=_count, default=1, metavar="N", help="engines that share the rows; default: 1")
    engines("--tensor-parallel-size", type=_count, default=1, metavar="N", help="of an engine; default: 1")
    engines("--pipeline-parallel-size", type=_count, default=1, metavar="N", help="of an engine; default: 1")
    engines("--quest", type=_mapping, default={}, metavar="JSON", help="QUEST's configuration (README)")
    engines("--kv-cache-dtype", metavar="DTYPE", help="vLLM's option of this name")
    engines("--engine", type=_mapping, default={}, metavar="JSON", help="other arguments of vLLM's engine")

    cluster = parser.add_argument_group("cluster").add_argument
    cluster(
        "--address", help="of a running Ray cluster: auto, HOST:PORT, ray://HOST:PORT; default: starts one"
    )
    cluster(
        "--cpus-per-worker",
        type=_count,
        default=1,
        metavar="N",
        help="CPUs reserved for each worker of an engine, without GPUs its threads; default: 1",
    )
    cluster(
        "--batch-size",
        type=_count,
        default=32,
        metavar="N",
        help="rows an engine takes at once, done again when it dies, and rows of an output file; default: 32",
    )
    cluster("--verbose", action="store_true", help="print what Ray and the engines log")
    return parser


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("an object is wanted, such as '{\"key\": 1}'")
    return value


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer, at least 1")
    return int(text)
