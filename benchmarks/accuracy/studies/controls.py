"""Negative controls: scorers broken on purpose, which a benchmark that is worth its name must show.

    python -m benchmarks.accuracy.studies.controls --context 2048 --quest '{"token_budget": 512}' --out FOLDER

adds them to the results in FOLDER, next to the sound scorer of the same configuration. They are scorers that
`broken_scorers` registers in this process.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # before vLLM is imported: the engine runs in this process
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.accuracy import tasks
from benchmarks.accuracy.grid import Grid
from benchmarks.accuracy.studies.broken_scorers import BROKEN
from benchmarks.common.arguments import command_line, json_object, of_samples
from tools.small_model import ModelError, prepare_model
from vllm_quest.config import QuestConfig

RETRIEVAL = "needle,key_value"


def main() -> None:
    arguments = _arguments()
    try:
        measure(**vars(arguments))
    except (ModelError, ValueError) as error:
        sys.exit(f"error: {error}")


def measure(
    model: str | None,
    context: int,
    samples: int,
    seed: int,
    retrieval: str,
    quest: dict[str, Any],
    out: Path,
) -> None:
    """Adds the scores of every control on the tasks `retrieval` to the results in `out`."""
    config = QuestConfig.from_dict(quest)
    model = model or str(prepare_model())
    built = tasks.unranked(tasks.numbered(model, context, samples, seed, retrieval.split(",")))
    controls = {
        f"control: {scorer.name.replace('_', ' ')}": replace(config, scorer=scorer.name) for scorer in BROKEN
    }
    Grid(model, context, built, controls, out, rouge=tasks.rouge_l, timed=False).run()


def _arguments() -> argparse.Namespace:
    parser = command_line(__doc__, of_samples(4096))
    parser.add_argument(
        "--tasks", dest="retrieval", default=RETRIEVAL, metavar="A,B,...", help="default: %(default)s"
    )
    parser.add_argument("--quest", type=json_object, default={}, metavar="JSON", help="what is broken")
    return parser.parse_args()


if __name__ == "__main__":
    main()
