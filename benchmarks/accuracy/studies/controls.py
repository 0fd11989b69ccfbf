"""Negative controls: scorers broken on purpose, which a benchmark that is worth its name must show.

    python -m benchmarks.accuracy.studies.controls --context 2048 --quest '{"token_budget": 512}' --out FOLDER

adds them to the results in FOLDER, beside the sound scorer of the same configuration. Nothing of this is part
of the package: the CPU backend's `score_pages` is exchanged from outside, in this process.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # before vLLM is imported: the engine runs in this process
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.accuracy import tasks
from benchmarks.accuracy.grid import Grid
from benchmarks.common.arguments import of_samples
from tools.small_model import ModelError, prepare_model
from vllm_quest.config import QuestConfig

if TYPE_CHECKING:
    import torch

__all__ = ["BROKEN", "broken_scorer"]

RETRIEVAL = "needle,key_value"


def _reversed_order(scores: torch.Tensor) -> torch.Tensor:
    return -scores


def _mean_over_the_layer(scores: torch.Tensor) -> torch.Tensor:
    return scores.mean(dim=1, keepdim=True).expand_as(scores).contiguous()


BROKEN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "control: reversed order": _reversed_order,
    "control: mean over the layer": _mean_over_the_layer,
}


@contextmanager
def broken_scorer(name: str) -> Iterator[None]:
    """Within it, decode rows select pages by what `BROKEN[name]` makes of their scores."""
    from vllm_quest.kernels import cpu as kernels

    sound = kernels.score_pages

    def score_pages(*arguments: Any, **named: Any) -> torch.Tensor:
        return BROKEN[name](sound(*arguments, **named))

    kernels.score_pages = score_pages
    try:
        yield
    finally:
        kernels.score_pages = sound


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
    for name in BROKEN:
        with broken_scorer(name):
            Grid(model, context, built, {name: config}, out, rouge=tasks.rouge_l, timed=False).run()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy.studies.controls",
        description=(__doc__ or "").split("\n")[0],
        parents=[of_samples(4096)],
    )
    parser.add_argument(
        "--tasks", dest="retrieval", default=RETRIEVAL, metavar="A,B,...", help="default: %(default)s"
    )
    parser.add_argument("--quest", type=json.loads, default={}, metavar="JSON", help="what is broken")
    return parser.parse_args()


if __name__ == "__main__":
    main()
