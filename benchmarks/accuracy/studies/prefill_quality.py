"""Where does the quality of prefill matter? The same decoding after exact and after approximate prefill.

    python -m benchmarks.accuracy.studies.prefill_quality --context 2048 --samples 30 --out FOLDER --json PATH

Prefill is made approximate in the two ways that the engine has. ``--tails``: the last tokens of the context
select pages as decoded ones do; then question and answer are decoded by selected pages, or densely, which
shows what prefill costs by itself; ``--quest`` configures them. ``--chunks``: with 4-bit pages, prompts in
chunks of so many tokens, whose later ones read the earlier ones in 4 bits. A run that was stopped continues.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from statistics import fmean
from typing import Any

# Before vLLM is imported, as in `benchmarks.accuracy.__main__`.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tqdm import tqdm

from benchmarks.accuracy import tasks
from benchmarks.accuracy.cells import DENSE, differences
from benchmarks.accuracy.configurations import name_of
from benchmarks.accuracy.engine import measure
from benchmarks.accuracy.grid import Grid
from benchmarks.accuracy.samples import Key, Results, Sample, Score, by_context
from benchmarks.accuracy.statistics import Interval, bootstrap
from benchmarks.accuracy.tasks.prompt import QUESTION_ROOM
from benchmarks.common.arguments import command_line, of_experiment
from benchmarks.common.machine import command, machine
from benchmarks.common.results import write_json
from benchmarks.common.tables import markdown
from tools.small_model import ModelError, prepare_model
from vllm_quest.config import QuestConfig
from vllm_quest.tune.instrument import Continuation, Instrument

TAILS = [128, 256, 512, 1024, 1408]
TASKS = ("needle", "key_value", "single_document_qa", "prose")
GRADED = ("needle", "key_value", "single_document_qa")  # whose answers can be exact
METRICS = {"nll": (1, 3), "kl": (1, 3), "exact": (100, 0)}  # scale and digits in the table
Scores = dict[tuple[str, str], dict[int, Score]]  # by configuration and task, then by sample


@dataclass(frozen=True)
class Arm:
    """One way to prefill a context, and one to decode question and answer behind it.

    Attributes:
        prefill: Selects for the last `decode_tail` tokens of the context.
        decode: Selects for question and answer.
        chunk: Tokens of a prompt that one step takes; None for all.
    """

    prefill: QuestConfig
    decode: QuestConfig
    chunk: int | None = None

    @property
    def name(self) -> str:
        """Its name in the results: all that distinguishes it."""
        return f"{name_of(self.prefill)} chunk={self.chunk or 'all'} -> {name_of(self.decode)}"

    @property
    def exact(self) -> Arm:
        """The same decoding after a prefill that no token of the context lost anything by."""
        return Arm(replace(self.prefill, decode_tail=0), self.decode)

    @property
    def engine(self) -> str:
        """Arms that agree in it can share an engine."""
        return json.dumps([self.prefill.cache_fields, self.chunk])


class Prefilling(Instrument):
    """An instrument that prefills every context by a configuration of its own; contexts end with a block.

    Attributes:
        prefill: That configuration.
    """

    prefill: QuestConfig

    def _prefilled(self, continuations: Iterable[Continuation], extra: int = 0) -> list[dict[str, Any]]:
        """As in `Instrument`; what one configuration prefilled is found by no other."""
        from vllm import SamplingParams

        continuations, decode = list(continuations), self.config
        salt = {"cache_salt": name_of(self.prefill)}
        self.configure(self.prefill)
        self.llm.generate(
            [
                salt | {"prompt_token_ids": list(one)}
                for one in dict.fromkeys(c.context for c in continuations)
            ],
            SamplingParams(max_tokens=1, detokenize=False),
            use_tqdm=False,
        )
        assert decode is not None
        self.configure(decode)
        return [salt] * len(continuations)


def arms_of(budget: int, quest: dict[str, Any], tails: list[int], chunks: list[int]) -> list[Arm]:
    """Each tail before sparse and before dense decoding; each chunk before dense decoding of 4-bit pages.

    Raises:
        QuestConfigError: Tails were asked for of a configuration that cannot have them.
    """
    sparse = QuestConfig.from_dict(quest | {"token_budget": budget})
    dense, int4 = replace(sparse, token_budget=None), QuestConfig(token_budget=None, kv_dtype="int4")
    arms = [Arm(sparse, sparse)] if tails else []
    for tail in tails:
        prefill = replace(sparse, decode_tail=tail)
        arms += [Arm(prefill, sparse), Arm(prefill, dense)]
    return arms + [Arm(int4, int4, chunk) for chunk in ([None, *chunks] if chunks else [])]


def main() -> None:
    arguments = _arguments()
    try:
        arms = arms_of(arguments.budget, arguments.quest, arguments.tails, arguments.chunks)
        if not arms or max([0, *arguments.tails]) >= arguments.context - QUESTION_ROOM:
            raise ValueError("--tails, --chunks: allowed: at least one; tails shorter than a context")
        model = arguments.model or str(prepare_model())
        samples = tasks.unranked(
            tasks.numbered(model, arguments.context, arguments.samples, arguments.seed, TASKS)
        )
        grid = Grid(model, arguments.context, samples, {}, arguments.out, rouge=tasks.rouge_l, timed=False)
        grid.run()  # dense, whose answers the others are compared with
        for _, group in groupby(arms, key=lambda arm: arm.engine):
            _measure(grid, list(group))
    except (ModelError, ValueError) as error:
        sys.exit(f"error: {error}")
    result = {
        "command": command()["command"],
        "machine": machine(),
        "model": Path(model).name,
        "context": arguments.context,
        "arms": list(summaries(grid.results, samples, arms)),
    }
    write_json(arguments.json_path, result)
    print(_table(result["arms"]))


def _measure(grid: Grid, arms: list[Arm]) -> None:
    """Adds what is missing of arms that share an engine; tasks alternate, so that each has its share."""
    missing = [
        (arm, wanted)
        for keys in sorted(by_context(grid.samples), key=lambda keys: keys[0][1])
        for arm in arms
        if (wanted := [key for key in keys if not grid.results.has(arm.name, *key)])
    ]
    if not missing:
        return
    chunked = {"max_num_batched_tokens": arms[0].chunk, "enable_chunked_prefill": True}
    instrument = Prefilling(
        arms[0].decode, grid.context + 1, model=grid.model, **(chunked if arms[0].chunk else {})
    )
    try:
        for arm, keys in tqdm(missing, unit="arm of a context"):
            instrument.prefill = arm.prefill
            instrument.configure(arm.decode)
            samples = {key: grid.samples[key] for key in keys}
            if instrument.is_stepping:
                samples = {key: _one_more(sample) for key, sample in samples.items()}
            for score in measure(instrument, arm.name, samples, grid.references, grid.rouge):
                grid.results.append(score)
    finally:
        instrument.close()


def _one_more(sample: Sample) -> Sample:
    """With the question's first token behind the context.

    Stepping begins with a prompt, whose last block vLLM computes again. Here this is that token, not the end
    of the context, which would become a chunk of its own.
    """
    first, *others = sample.question
    return replace(sample, context=(*sample.context, first), question=tuple(others))


def summaries(results: Results, samples: Iterable[Key], arms: list[Arm]) -> Iterator[dict[str, Any]]:
    """Every arm on every task and in their mean; changes to dense and to exact prefill, paired by sample."""
    keys, names = set(samples), {arm.name for arm in arms}
    scores: Scores = {}
    for one in results.scores:
        if (one.task, one.sample) in keys:
            scores.setdefault((one.configuration, one.task), {})[one.sample] = one
    for arm in arms:
        exact = arm.exact.name if arm.exact.name in names else DENSE
        bases = {"dense": DENSE, "exact_prefill": exact}
        groups = {task: (task,) for task in TASKS} | {"mean": TASKS}
        yield {
            "prefill": asdict(arm.prefill),
            "decode": asdict(arm.decode),
            "chunk": arm.chunk,
            "tasks": {name: _metrics(scores, group, arm.name, bases) for name, group in groups.items()},
        }


def _metrics(scores: Scores, group: Sequence[str], own: str, bases: dict[str, str]) -> dict[str, Any]:
    """Means over the tasks of `group`, and their changes to each base."""
    found: dict[str, Any] = {"samples": sum(len(scores[own, task]) for task in group)}
    for metric in METRICS:
        value = attrgetter(metric)
        of = [task for task in group if metric != "exact" or task in GRADED]
        if not of:
            continue
        found[metric] = fmean(fmean(map(value, scores[own, task].values())) for task in of)
        for name, base in bases.items():
            changes = [differences(scores[own, task], scores[base, task], value) for task in of]
            found[f"{metric}_to_{name}"] = list(bootstrap(changes))
    return found


def _table(arms: list[dict[str, Any]]) -> str:
    columns = ("task", "decode", "prefill", "exact, %", "KL", "NLL", "NLL, change", "KL, change",
               "exact, points")  # fmt: skip
    rows = []
    for task in arms[0]["tasks"]:
        for arm in arms:
            decode = "sparse" if arm["decode"]["token_budget"] else arm["decode"]["kv_dtype"]
            tail = f"tail of {arm['prefill']['decode_tail']}"
            prefill = f"chunks of {arm['chunk']}" if arm["chunk"] else tail
            rows.append([task, decode, prefill, *_cells(arm["tasks"][task])])
    return markdown(columns, rows)


def _cells(found: dict[str, Any]) -> list[str]:
    """Means, the change of NLL to dense, and all changes to exact prefill."""
    shown = {"nll_to_dense": METRICS["nll"]}
    shown |= {f"{metric}_to_exact_prefill": format_ for metric, format_ in METRICS.items()}
    return [
        f"{found['exact']:.0%}" if "exact" in found else "-",
        f"{found['kl']:.3f}",
        *(
            Interval(*found[name]).text(f"+.{digits}f", scale) if name in found else "-"
            for name, (scale, digits) in shown.items()
        ),
    ]


def _arguments() -> argparse.Namespace:
    parser = command_line(__doc__, of_experiment())
    add = parser.add_argument
    add("--budget", type=int, default=512, metavar="N", help="tokens; default: %(default)s")
    add("--tails", type=int, nargs="*", default=TAILS, metavar="N", help="last tokens of the context")
    add("--chunks", type=int, nargs="*", default=[512, 256], metavar="N", help="tokens of a prompt per step")
    return parser.parse_args()


if __name__ == "__main__":
    main()
