"""Measures what a configuration costs in quality; the report and the 4-bit gate are subcommands.

    python -m benchmarks.accuracy [--model MODEL] [--context N] [--samples N] [--tasks A,B] --out FOLDER
    python -m benchmarks.accuracy report FOLDER
    python -m benchmarks.accuracy gate [--model MODEL] [--quest JSON ...]

Without further flags a grid of standard configurations is measured. ``--vary FIELD=A,B`` (for any field of
the `quest` configuration, repeatable) measures each value alone around ``--base FIELD=VALUE``; with
``--cross`` all combinations; ``--quest JSON`` adds one configuration. A run that was interrupted continues
where it stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# Before vLLM is imported: the bar stays readable, and OpenMP's threads do not spin between steps.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("PYTHONWARNINGS", "ignore")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.accuracy import configurations, sample_file
from benchmarks.accuracy.grid import Grid
from benchmarks.accuracy.samples import Key, Sample
from benchmarks.accuracy.studies import gate
from benchmarks.common.arguments import command_line, json_object, of_samples
from tools.small_model import ModelError, prepare_model
from vllm_quest.config import QuestConfig


def main() -> None:
    """The command line."""
    command, arguments = sys.argv[1:2], sys.argv[2:]
    try:
        if command == ["report"]:
            _report(arguments)
        elif command == ["gate"]:
            gate.main(arguments)
        else:
            _grid(_arguments())
    except (ModelError, ValueError) as error:
        sys.exit(f"error: {error}")


def _grid(arguments: argparse.Namespace) -> None:
    from benchmarks.accuracy import tasks

    chosen = _configurations(arguments)  # refuses a wrong one before any work
    model = arguments.model or str(prepare_model())
    origin, samples = _samples(arguments, model)
    if not arguments.ranks:
        samples = tasks.unranked(samples)
    Grid(
        model=model,
        context=arguments.context,
        samples=samples,
        configurations=chosen,
        out=arguments.out,
        rouge=tasks.rouge_l,
        engine_args=arguments.engine_args,
        timed=arguments.times,
        contexts_at_once=arguments.contexts_at_once,
        versions={"Python of the texts": origin.python},
    ).run()
    print(f"python -m benchmarks.accuracy report {arguments.out}")


def _samples(arguments: argparse.Namespace, model: str) -> tuple[sample_file.Origin, dict[Key, Sample]]:
    """From the file that the flags name; without one, or if it is not there yet, built by this Python."""
    from benchmarks.accuracy import tasks

    names = arguments.tasks.split(",") if arguments.tasks else list(tasks.TASKS)
    origin = sample_file.Origin(Path(model).name, arguments.context, arguments.seed)
    if arguments.samples_file and arguments.samples_file.exists():
        return sample_file.load(arguments.samples_file, origin, names, arguments.samples)
    samples = tasks.numbered(model, arguments.context, arguments.samples, arguments.seed, names)
    if arguments.samples_file:
        sample_file.save(arguments.samples_file, origin, samples)
    return origin, samples


def _configurations(arguments: argparse.Namespace) -> dict[str, QuestConfig]:
    """Those that the flags name; the standard ones without any."""
    if arguments.dense_only:
        return {}
    if not (arguments.vary or arguments.base or arguments.quest):
        return configurations.standard(arguments.context)
    chosen: dict[str, QuestConfig] = {}
    if arguments.vary or arguments.base:
        factors = dict(map(configurations.parse_field, arguments.vary))
        base = {field: values[0] for field, values in map(configurations.parse_field, arguments.base)}
        combine = configurations.crossed if arguments.cross else configurations.one_at_a_time
        chosen |= combine(QuestConfig.from_dict(base), factors)
    for entries in arguments.quest:
        chosen |= configurations.from_entries(entries)
    return chosen


def _report(arguments: list[str]) -> None:
    from benchmarks.accuracy.report import write_report

    parser = command_line("Writes tables and pictures of what the grid measured.", command="report")
    parser.add_argument("folder", type=Path, help="what --out named")
    print(write_report(parser.parse_args(arguments).folder))


def _arguments() -> argparse.Namespace:
    parser = command_line(__doc__, of_samples(4096))
    add = parser.add_argument
    add("--tasks", metavar="A,B,...", help="default: all")
    add(
        "--samples-file",
        type=Path,
        metavar="FILE",
        help="written where it does not exist, else read: so machines with other Pythons measure the same",
    )
    add("--vary", action="append", default=[], metavar="FIELD=A,B", help="values of a field; repeatable")
    add("--base", action="append", default=[], metavar="FIELD=VALUE", help="what --vary varies; repeatable")
    add("--cross", action="store_true", help="all combinations of what --vary names")
    add(
        "--quest",
        action="append",
        default=[],
        type=json_object,
        metavar="JSON",
        help="one configuration; repeatable",
    )
    add("--dense-only", action="store_true", help="what runs side by side copy before they start")
    add("--no-ranks", dest="ranks", action="store_false", help="score no distractors: most of the work")
    add("--no-times", dest="times", action="store_false", help="for a machine that is busy otherwise")
    add(
        "--contexts-at-once",
        type=int,
        default=1,
        metavar="N",
        help="whose samples are one batch, for GPUs with --engine-args '{\"max_num_seqs\": ...}'; default: 1",
    )
    add("--engine-args", type=json_object, default={}, metavar="JSON", help="more arguments of vLLM's LLM")
    return parser.parse_args()


if __name__ == "__main__":
    main()
