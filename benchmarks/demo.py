"""Asks a real model about a long document, with vLLM's dense attention and with QUEST, side by side.

    python -m benchmarks.demo [--json PATH] [--model PATH] [--token-budget N] [--page-size N] [--repeats N]

All figures are measured in this run. Ends with status 1 if QUEST's pass-key answer is not the dense one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Before vLLM is imported: the report stays readable. VLLM_LOGGING_LEVEL=INFO brings vLLM's own lines back.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("PYTHONWARNINGS", "ignore")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from tqdm import tqdm

from benchmarks.documents import string_methods
from benchmarks.engine_run import EngineRun, num_stages, run_engine
from benchmarks.model import ModelError, prepare_model
from benchmarks.report import answers_text, as_json, figures, judge, table_text
from vllm_quest.config import QuestConfig, QuestConfigError

MAX_MODEL_LEN = 8192  # SmolLM2's context


def main() -> None:
    arguments = _arguments()
    try:
        model = str(arguments.model or prepare_model())
        run_demo(model, arguments)
    except (ModelError, QuestConfigError) as error:
        sys.exit(f"error: {error}")


def run_demo(model: str, arguments: argparse.Namespace) -> None:
    """Runs both engines, prints the report and writes the JSON file."""
    document = string_methods()
    prompts = [document.prompt(question) for question in document.questions]
    dense, quest, config = _run_both(model, prompts, arguments)

    verdicts = judge(document.questions, dense, quest)
    rows = figures(dense, quest, config.page_size)
    machine = _machine()
    context = max(dense.prompt_tokens)
    print(
        ", ".join(f"{name} {value}" for name, value in machine.items()),
        f"model {Path(model).name}, context {context} tokens, batch 1, greedy; {config}",
        answers_text(verdicts),
        table_text(rows),
        sep="\n\n",
    )
    if arguments.json:
        result: dict[str, Any] = {
            "machine": machine,
            "model": Path(model).name,
            "context": context,
            "config": asdict(config),
            **as_json(verdicts, rows),
            "runs": {"dense": asdict(dense), "quest": asdict(quest)},
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    pass_key = verdicts[0]
    if not pass_key.quest_right or pass_key.quest != pass_key.dense:
        sys.exit("QUEST's pass-key answer is not the dense one.")


def _run_both(
    model: str, prompts: list[str], arguments: argparse.Namespace
) -> tuple[EngineRun, EngineRun, QuestConfig]:
    """Dense, then QUEST with a quarter of the context unless a budget was named."""
    from vllm.platforms import current_platform

    dense_args = {"attention_backend": "CPU_ATTN"} if current_platform.is_cpu() else {}
    with tqdm(total=2 * num_stages(len(prompts), arguments.repeats), unit="stage") as bar:

        def run(name: str, **engine_args: Any) -> EngineRun:
            @contextmanager
            def stage(work: str) -> Iterator[None]:
                bar.set_description(f"{name}: {work}")
                yield
                bar.update()

            return run_engine(
                prompts,
                arguments.repeats,
                stage,
                model=model,
                max_model_len=MAX_MODEL_LEN,
                **engine_args,
            )

        dense = run("dense", **dense_args)
        page_size = arguments.page_size
        quarter = min(dense.prompt_tokens) // 4 // page_size * page_size
        config = QuestConfig(page_size=page_size, token_budget=arguments.token_budget or quarter)
        quest = run("QUEST", attention_backend="QUEST", additional_config={"quest": asdict(config)})
    return dense, quest, config


def _machine() -> dict[str, str]:
    import torch
    import vllm
    from vllm.platforms import current_platform

    import vllm_quest

    device = _cpu_name() if current_platform.is_cpu() else current_platform.get_device_name()
    return {
        "vllm-quest": vllm_quest.__version__,
        "vLLM": vllm.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "device": device,
        "cores": str(len(os.sched_getaffinity(0))),
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write everything measured to PATH")
    parser.add_argument(
        "--model", type=Path, metavar="PATH", help="model folder; default: SmolLM2-135M-Instruct"
    )
    parser.add_argument("--token-budget", type=int, metavar="N", help="default: a quarter of the context")
    parser.add_argument("--page-size", type=int, metavar="N", default=16, help="default: 16")
    parser.add_argument("--repeats", type=int, metavar="N", default=5, help="of each timing; default: 5")
    return parser.parse_args()


if __name__ == "__main__":
    main()
