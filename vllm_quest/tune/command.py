"""``vllm-quest tune``: recommends a configuration for a model, and shows why."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vllm_quest.config import QuestConfig
from vllm_quest.tune.probes import ProbeError, default_texts, read_texts, recall_samples, text_samples
from vllm_quest.tune.samples import Sample
from vllm_quest.tune.search import (
    DENSE_LAYERS,
    Dense,
    Trial,
    budgets,
    cheapest,
    measure,
    measure_dense,
    smallest_passing,
)

__all__ = ["main"]

CACHES: tuple[dict[str, Any], ...] = (
    {"page_size": 16, "bounds_dtype": "auto"},
    {"page_size": 8, "bounds_dtype": "int8"},
    {"page_size": 16, "kv_dtype": "int4"},
    {"page_size": 16, "kv_dtype": "int4", "value_group_size": 32},
    {"page_size": 8, "kv_dtype": "int4"},
    {"page_size": 8, "kv_dtype": "int4", "value_group_size": 32},
)


def main(arguments: list[str]) -> int:
    """Runs the search; returns the exit status: 1 where no configuration is within the loss."""
    options = _options(arguments)
    # The report stays readable, and OpenMP's threads do not spin between steps.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        samples = _samples(options)
    except ProbeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    dense, trials = _search(options, samples)
    chosen = cheapest(trials, options.max_loss)
    print(_report(options, dense, trials, chosen))
    if chosen is None:
        return 1
    entries = {"quest": _entries(chosen.config)}
    options.out.write_text(json.dumps(entries, indent=1) + "\n")
    print(
        f"\n{options.out} has it. To serve:\n\n    vllm serve {options.model} --attention-backend QUEST "
        f"--additional-config '{json.dumps(entries)}'"
    )
    return 0


def _search(options: argparse.Namespace, samples: list[Sample]) -> tuple[Dense, list[Trial]]:
    """Dense, then an engine per cache layout; in each a bisection over budgets per number of dense layers."""
    trials: list[Trial] = []
    caches = [QuestConfig.from_dict(cache) for cache in CACHES if _is_asked_for(cache, options)]
    most = math.ceil(math.log2(len(budgets(options.context, caches[0])) + 1))
    with tqdm(total=1 + len(caches) * len(DENSE_LAYERS) * most, unit="trial") as bar:
        with _engine(options, samples, None, bar) as instrument:
            dense = measure_dense(instrument, samples)
            bar.update()
        for cache in caches:
            with _engine(options, samples, cache, bar) as instrument:

                def try_one(config: QuestConfig) -> bool:
                    bar.set_description(_words(config))
                    instrument.configure(config)
                    trials.append(replace(measure(instrument, samples, dense), config=config))
                    bar.update()
                    return trials[-1].passes(options.max_loss)

                for layers in DENSE_LAYERS:
                    smallest_passing(replace(cache, dense_layers=layers), options.context, try_one)
    return dense, trials


@contextmanager
def _engine(
    options: argparse.Namespace, samples: list[Sample], config: QuestConfig | None, bar: tqdm
) -> Iterator[Any]:
    from vllm_quest.tune.instrument import Instrument

    bar.set_description(f"start an engine: {_words(config) if config else 'dense'}")
    longest = max(len(one.context) + len(one.question) + len(one.answer) for one in samples) + 1
    instrument = Instrument(config, longest, model=options.model, **options.engine_args)
    try:
        yield instrument
    finally:
        instrument.close()


def _samples(options: argparse.Namespace) -> list[Sample]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = read_texts(options.texts) if options.texts else default_texts()
    return text_samples(tokenizer, texts, options.context) + recall_samples(tokenizer, options.context)


def _is_asked_for(cache: dict[str, Any], options: argparse.Namespace) -> bool:
    return cache.get("kv_dtype", "auto") in options.kv_dtypes


def _report(options: argparse.Namespace, dense: Dense, trials: Sequence[Trial], chosen: Trial | None) -> str:
    recall = f"{dense.recall:.0f} % of the digits in lists right"
    if not dense.can_recall:
        recall += ": it cannot do it, so recall does not count"
    texts = ", ".join(map(str, options.texts or default_texts()))
    width = max(len(_words(trial.config)) for trial in trials)
    lines = [
        f"{options.model}, {dense.dtype}, context {options.context}. Dense attention gets {recall}.",
        f"At most {options.max_loss:g} % lost. Texts: {texts}.",
        "",
        f"{'  configuration':<{width + 2}}{'reads':>8}{'memory':>8}{'text':>16}{'recall':>9}",
    ]
    for trial in sorted(trials, key=lambda one: one.read_share):
        mark = "*" if trial is chosen else " " if trial.passes(options.max_loss) else "x"
        loss = "" if trial.recall_loss is None else f"{trial.recall_loss:+.1f}"
        text = f"{trial.text_loss:+.2f} ± {trial.text_error:.2f}"
        lines.append(
            f"{mark} {_words(trial.config):<{width}}{trial.read_share:>8.1%}{trial.memory_share:>8.1%}"
            f"{text:>16}{loss:>9}"
        )
    lines += [
        "",
        "reads, memory: KV bytes per decoded token and per token of context, as shares of dense attention's",
        f"in {dense.dtype}; they say nothing about time.",
        "text: rise of the perplexity in percent, 95 % interval; recall: points of right digits lost.",
        "* recommended: reads least of those within the loss; x loses too much. Decided by the estimates,",
        "not by their intervals; --texts of your own make it yours.",
    ]
    if chosen is None:
        lines.append("No configuration is within the loss: allow more, or decode densely.")
    elif chosen.worst_text_loss > options.max_loss:
        lines.append(_doubt(options.max_loss, trials, chosen))
    return "\n".join(lines)


def _doubt(max_loss: float, trials: Sequence[Trial], chosen: Trial) -> str:
    """What the interval of the recommended one leaves open, and what to take instead."""
    sure = cheapest([trial for trial in trials if trial.worst_text_loss <= max_loss], max_loss)
    instead = f"{_words(sure.config)} reads least" if sure else "none is"
    return (
        f"The interval of the recommended one reaches {chosen.worst_text_loss:+.2f} %. "
        f"Of those within the loss with all of it, {instead}."
    )


def _words(config: QuestConfig) -> str:
    entries = _entries(config).items()
    return " ".join(f"{name}={'all' if value is None else value}" for name, value in entries)


def _entries(config: QuestConfig) -> dict[str, Any]:
    """The budget, the page size, and whatever is not the default."""
    default = asdict(QuestConfig())
    shown = ("token_budget", "page_size", "dense_layers")
    return {name: value for name, value in asdict(config).items() if name in shown or value != default[name]}


def _percent(text: str) -> float:
    """``1%`` or ``1``."""
    value = float(text.removesuffix("%"))
    if not 0 < value < 100:
        raise argparse.ArgumentTypeError(f"{text!r}: allowed: between 0% and 100%")
    return value


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vllm-quest tune",
        description="Finds the configuration that reads least of the KV cache within a loss of quality.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or name, as vLLM takes it")
    add(
        "--max-loss",
        type=_percent,
        default=1.0,
        metavar="1%",
        help="rise of perplexity in percent, and points of recall; default: 1%%",
    )
    add("--texts", type=Path, nargs="+", metavar="FILE", help="what you decode; default: Python's own texts")
    add("--context", type=int, default=4096, metavar="N", help="tokens that are decoded after; default: 4096")
    add(
        "--kv-dtypes",
        nargs="+",
        choices=("auto", "int4"),
        default=["auto"],
        help="formats of the cache to try; default: auto",
    )
    add("--engine-args", type=json.loads, default={}, metavar="JSON", help="more arguments of vLLM's LLM")
    add("--out", type=Path, default=Path("quest.json"), metavar="PATH", help="default: quest.json")
    return parser.parse_args(arguments)
