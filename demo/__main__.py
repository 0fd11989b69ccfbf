"""Asks a real model about a long document, with vLLM's dense attention and with QUEST, side by side.

    python -m demo [--json PATH] [--model PATH] [--token-budget N] [--quest JSON] [--repeats N]

All figures are measured in this run. Ends with status 1 if QUEST's pass-key answer is not the dense one.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

# Before vLLM is imported: the report stays readable. VLLM_LOGGING_LEVEL=INFO brings vLLM's own lines back.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("PYTHONWARNINGS", "ignore")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from tqdm import tqdm

from benchmarks.common.arguments import command_line, json_object, of_model
from benchmarks.common.machine import machine
from benchmarks.common.results import write_json
from benchmarks.engine.contenders import dense_defaults
from benchmarks.engine.run import Engine, EngineRun
from demo.documents import string_methods
from demo.report import answers_text, as_json, figures, judge, table_text
from tools.small_model import ModelError, prepare_model
from vllm_quest.config import QuestConfig, QuestConfigError

MAX_MODEL_LEN = 8192  # SmolLM2's context


def main() -> None:
    arguments = _arguments()
    try:
        _config(arguments, context=MAX_MODEL_LEN)  # refuses wrong arguments before any work
        run_demo(str(arguments.model or prepare_model()), arguments)
    except (ModelError, QuestConfigError) as error:
        sys.exit(f"error: {error}")


def run_demo(model: str, arguments: argparse.Namespace) -> None:
    """Runs both engines, prints the report and writes the JSON file."""
    document = string_methods()
    prompts = [document.prompt(question) for question in document.questions]
    dense, quest, config = _run_both(model, prompts, arguments)

    verdicts = judge(document.questions, dense, quest)
    rows = figures(dense, quest, config)
    about = machine()
    context = max(dense.prompt_tokens)
    print(
        ", ".join(f"{name} {value}" for name, value in about.items()),
        f"{Path(model).name}, context {context} tokens, batch 1, greedy, median of {arguments.repeats}\n"
        f"{config}",
        answers_text(verdicts),
        table_text(rows),
        sep="\n\n",
    )
    if arguments.json:
        result: dict[str, Any] = {
            "machine": about,
            "model": Path(model).name,
            "context": context,
            "config": asdict(config),
            **as_json(verdicts, rows),
            "runs": {"dense": asdict(dense), "quest": asdict(quest)},
        }
        write_json(arguments.json, result)
    pass_key = verdicts[0]
    if not pass_key.quest_right or pass_key.quest != pass_key.dense:
        sys.exit("QUEST's pass-key answer is not the dense one.")


def _run_both(
    model: str, prompts: list[str], arguments: argparse.Namespace
) -> tuple[EngineRun, EngineRun, QuestConfig]:
    """Dense, then QUEST with a quarter of the context unless a budget was named; timed alternately.

    Whatever else the machine does meanwhile then slows both.
    """
    import vllm_quest

    common: dict[str, Any] = {"model": model, "max_model_len": MAX_MODEL_LEN}
    repeats = arguments.repeats
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=2 * (1 + len(prompts) + repeats), unit="stage"))
        dense = _started("dense", prompts, bar, stack, common | {"attention_backend": dense_defaults()[0]})
        config = _config(arguments, context=min(dense.run.prompt_tokens))
        backend = {"attention_backend": "QUEST", "additional_config": {"quest": asdict(config)}}
        quest = _started("QUEST", prompts, bar, stack, common | backend)
        for _ in range(repeats):
            for name, engine in (("dense", dense), ("QUEST", quest)):
                with _stage(bar, f"{name}: time decoding"):
                    engine.time_decoding(prompts[0])
        quest.run.counters = vllm_quest.read_counters()
    return dense.run, quest.run, config


def _config(arguments: argparse.Namespace, context: int) -> QuestConfig:
    """What the user asked for; the budget a quarter of `context` tokens unless named."""
    config = QuestConfig.from_dict({"token_budget": None} | arguments.quest)
    quarter = context // 4 // config.page_size * config.page_size
    return replace(config, token_budget=quarter if arguments.token_budget is None else arguments.token_budget)


def _started(
    name: str, prompts: list[str], bar: tqdm, stack: ExitStack, engine_args: dict[str, Any]
) -> Engine:
    """An engine that has answered every prompt; `stack` closes it."""
    with _stage(bar, f"{name}: start the engine"):
        engine = Engine(**engine_args)
    stack.callback(engine.close)
    for number, prompt in enumerate(prompts, start=1):
        with _stage(bar, f"{name}: question {number}"):
            engine.ask(prompt)
    return engine


@contextmanager
def _stage(bar: tqdm, work: str) -> Iterator[None]:
    bar.set_description(work)
    yield
    bar.update()


def _arguments() -> argparse.Namespace:
    parser = command_line(__doc__, of_model())
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write everything measured to PATH")
    parser.add_argument("--token-budget", type=int, metavar="N", help="default: a quarter of the context")
    parser.add_argument("--quest", type=json_object, default={}, metavar="JSON", help="its other fields")
    parser.add_argument("--repeats", type=int, metavar="N", default=5, help="of each timing; default: 5")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error("--repeats: at least 1")
    return arguments


if __name__ == "__main__":
    main()
