"""A small batch: questions about Python's documentation, one bad row, two engines on this machine by Ray.

python -m demo.batch
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

from tools.small_model import prepare_model
from vllm_quest.batch import command

TOPICS = ("assert", "booleans", "break", "for", "if", "import", "try", "while", "with")
CHARS = 3000  # of each topic: contexts of 300 to 800 tokens
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 2048,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 1 << 29,
}


def main() -> int:
    """Runs the batch in a new folder and prints what came out; returns the command's exit status."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    folder = Path(tempfile.mkdtemp(prefix="vllm-quest-demo-batch-"))
    (folder / "questions.jsonl").write_text("".join(f"{line}\n" for line in _lines()))
    status = command.main(
        [
            *(str(folder / "questions.jsonl"), str(folder / "out"), "--model", str(prepare_model())),
            *("--replicas", str(min(2, len(os.sched_getaffinity(0)))), "--batch-size", "2"),
            *("--quest", json.dumps({"token_budget": 256}), "--engine", json.dumps(ENGINE)),
            *("--sampling", json.dumps({"max_tokens": 24, "temperature": 0})),
        ]
    )
    for file in sorted((folder / "out").glob("*.jsonl")):
        for record in map(json.loads, file.read_text().splitlines()):
            print(_line(record))
    return status


def _lines() -> list[str]:
    """Nine questions, and a row that is none."""
    rows = []
    for name in TOPICS:
        question = f"{topics[name][:CHARS]}\n\nSay in one sentence what this text is about."
        rows.append({"custom_id": name, "messages": [{"role": "user", "content": question}]})
    return [*map(json.dumps, rows), '{"custom_id": "bad", "question": "no messages"}']


def _line(record: dict) -> str:
    if record["error"]:
        return f"{record['custom_id']:10}ERROR  {record['error']['message']}"
    content = record["response"]["body"]["choices"][0]["message"]["content"]
    return f"{record['custom_id']:10}{' '.join(content.split())}"


if __name__ == "__main__":
    sys.exit(main())
