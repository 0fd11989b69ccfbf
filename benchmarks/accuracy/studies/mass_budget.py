"""Should the budget follow an estimate of attention's mass? Fixed and estimated budgets at equal reads.

    python -m benchmarks.accuracy.studies.mass_budget --context 2048 --budgets 256 512 --out FOLDER \\
        --json PATH

QUEST's bound always ranks the pages. How many are read differs: what `token_budget` says, or, for each row
and KV head, as many as an estimate of the softmax needs to reach the share p. One p for all tasks is
calibrated on contexts of another seed, so that the tasks' mean reads what the fixed budget reads. The scorer
is one that `mass_scorer` registers in this process.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # before vLLM is imported: the engine runs in this process
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from tqdm import tqdm

from benchmarks.accuracy import tasks
from benchmarks.accuracy.engine import measure
from benchmarks.accuracy.grid import Grid
from benchmarks.accuracy.samples import Key, Sample, Score, by_context
from benchmarks.accuracy.statistics import bootstrap
from benchmarks.accuracy.studies.mass import ESTIMATES
from benchmarks.accuracy.studies.mass_scorer import SHARES, Budget, MassScorer, budget_by
from benchmarks.common.arguments import command_line, of_experiment
from benchmarks.common.machine import command
from benchmarks.common.results import write_json
from benchmarks.common.tables import markdown
from tools.small_model import ModelError, prepare_model
from vllm_quest.config import QuestConfig
from vllm_quest.tune.instrument import Continuation, Instrument

TASKS = ("needle", "key_value", "single_document_qa", "prose")
CALIBRATION_SEED, CALIBRATION_SAMPLES = 1000, 5


def main() -> None:
    arguments = _arguments()
    try:
        result = run(**vars(arguments))
    except (ModelError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(_table(result))


def run(
    model: str | None,
    context: int,
    samples: int,
    seed: int,
    budgets: list[int],
    quest: dict[str, Any],
    out: Path,
    json_path: Path,
) -> dict[str, Any]:
    """Measures every arm on the same samples, dense first; returns and writes what they say."""
    configs = [
        QuestConfig.from_dict(quest | {"token_budget": budget, "scorer": MassScorer.name})
        for budget in budgets
    ]
    if not all(config.steps_alike for config in configs) or max(budgets) >= context:
        raise ValueError("--quest, --budgets: allowed: what decode_tail can do, budgets below --context")
    model = model or str(prepare_model())
    measured = tasks.unranked(tasks.numbered(model, context, samples, seed, TASKS))
    grid = Grid(model, context, measured, {}, out, rouge=tasks.rouge_l, timed=False)
    grid.run()  # dense, whose answers the others are compared with
    calibration = tasks.numbered(model, context, CALIBRATION_SAMPLES, CALIBRATION_SEED, TASKS)
    instrument = Instrument(configs[0], context + 1, model=model)
    try:
        shares = _calibrate(instrument, grid, calibration, configs)
        scores = _measure(instrument, grid, configs, shares)
    finally:
        instrument.close()
    result = {
        **command(),
        "model": Path(model).name,
        "context": context,
        "quest": [asdict(config) for config in configs],
        "shares": shares,
        "arms": _summaries(grid.results.scores, scores),
    }
    write_json(json_path, result)
    return result


def _calibrate(
    instrument: Instrument, grid: Grid, samples: dict[Key, Sample], configs: list[QuestConfig]
) -> dict[str, dict[str, float]]:
    """The share of the mass that reads, in the mean over tasks, what each fixed budget reads.

    By the queries that the largest budget gives: what other selections would change in them is left out.
    """
    by_task: dict[str, Budget] = {}
    instrument.configure(configs[-1])
    for keys in tqdm(by_context(samples), desc="calibrate"):
        chosen = [samples[key] for key in keys]
        with budget_by(by_task.setdefault(chosen[0].task, Budget(calibrates=True))):
            instrument.score([Continuation(one.context, (*one.question, *one.answer)) for one in chosen])
    shares: dict[str, dict[str, float]] = {}
    pages = grid.context / configs[0].page_size
    for config in configs:
        wanted = config.budget_pages / pages
        shares[str(config.token_budget)] = {
            name: float(
                np.interp(
                    wanted,
                    np.mean([one.reads[name] / one.pages_in_context for one in by_task.values()], axis=0),
                    SHARES,
                )
            )
            for name in ESTIMATES
        }
    return shares


def _measure(
    instrument: Instrument, grid: Grid, configs: list[QuestConfig], shares: dict[str, dict[str, float]]
) -> dict[tuple[str, str], list[Score]]:
    """Scores by budget and arm; arms alternate at each context, whose prefill is paid once."""
    scores: dict[tuple[str, str], list[Score]] = {}
    for keys in tqdm(by_context(grid.samples), desc="measure"):
        samples = {key: grid.samples[key] for key in keys}
        for config in configs:
            instrument.configure(config)
            size = str(config.token_budget)
            for arm, share in {"fixed": 0.0, **shares[size]}.items():
                budget = Budget(None if arm == "fixed" else arm, share)
                with budget_by(budget):
                    measured = measure(instrument, arm, samples, grid.references, grid.rouge)
                counters = {"pages_read": budget.pages_read, "pages_in_context": budget.pages_in_context}
                counters = {name: round(count / len(keys)) for name, count in counters.items()}
                scores.setdefault((size, arm), []).extend(replace(one, counters=counters) for one in measured)
    return scores


def _summaries(dense: list[Score], scores: dict[tuple[str, str], list[Score]]) -> list[dict[str, Any]]:
    """Every arm on every task and in their mean: changes to dense, and to the fixed budget, paired."""
    reference = {(one.task, one.sample): one for one in dense if one.configuration == "dense"}
    summaries = []
    for (size, arm), own in scores.items():
        fixed = {(one.task, one.sample): one for one in scores[size, "fixed"]}
        for names in [*((task,) for task in TASKS), TASKS]:
            groups = [[one for one in own if one.task == task] for task in names]

            def change(field: str, others: dict[tuple[str, int], Score], groups: Any = groups) -> list[float]:
                return list(
                    bootstrap(
                        [
                            [getattr(s, field) - getattr(others[s.task, s.sample], field) for s in group]
                            for group in groups
                        ]
                    )
                )

            summaries.append(
                {
                    "token_budget": int(size),
                    "arm": arm,
                    "task": names[0] if len(names) == 1 else "mean",
                    "samples": sum(map(len, groups)),
                    "read_share": fmean(
                        sum(s.counters["pages_read"] for s in group)
                        / sum(s.counters["pages_in_context"] for s in group)
                        for group in groups
                    ),
                    "kl": fmean(fmean(s.kl for s in group) for group in groups),
                    "nll_change": change("nll", reference),
                    "exact_change": change("exact", reference),
                }
                | {f"{name}_to_fixed": change(name, fixed) for name in ("nll", "kl", "exact")}
            )
    return summaries


def _table(result: dict[str, Any]) -> str:
    columns = (
        "budget",
        "task",
        "pages by",
        "pages read",
        "NLL, to fixed",
        "KL",
        "KL, to fixed",
        "exact, points",
    )
    rows = []
    for one in sorted(result["arms"], key=lambda one: (one["token_budget"], one["task"])):
        nll, kl, exact = (
            "{:+.{}f} [{:+.{}f}, {:+.{}f}]".format(
                *(x for end in one[f"{name}_to_fixed"] for x in (end * scale, digits))
            )
            for name, scale, digits in (("nll", 1, 3), ("kl", 1, 3), ("exact", 100, 0))
        )
        budget, share = str(one["token_budget"]), f"{one['read_share']:.1%}"
        rows.append((budget, one["task"], one["arm"], share, nll, f"{one['kl']:.3f}", kl, exact))
    return markdown(columns, rows)


def _arguments() -> argparse.Namespace:
    parser = command_line(__doc__, of_experiment())
    add = parser.add_argument
    add("--budgets", type=int, nargs="+", default=[256, 512], metavar="N", help="tokens; default: 256 512")
    return parser.parse_args()


if __name__ == "__main__":
    main()
