"""Samples in a file, so that machines with different Pythons measure the same ones.

The texts of the tasks are Python's own and change with its version. The file is JSON lines: what the samples
were built from, then every context once, then the samples.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import msgspec

from benchmarks.accuracy.samples import Key, Sample
from benchmarks.common.results import read_lines

__all__ = ["Origin", "load", "save"]


@dataclass(frozen=True)
class Origin:
    """What samples were built from.

    Attributes:
        model: Name of the model whose tokens they are.
        context: Tokens.
        seed: Of the tasks.
        python: Version of Python whose texts they are.
    """

    model: str
    context: int
    seed: int
    python: str = platform.python_version()


def save(path: Path, origin: Origin, samples: dict[Key, Sample]) -> None:
    """Writes `samples` to `path`; a file that is there is replaced when all is written."""
    contexts = {sample.context_id: sample.context for sample in samples.values()}
    lines: list[object] = [asdict(origin), contexts]
    lines += [[*key, asdict(replace(sample, context=()))] for key, sample in samples.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    partial.replace(path)


def load(path: Path, wanted: Origin, tasks: list[str], count: int) -> tuple[Origin, dict[Key, Sample]]:
    """The first `count` samples of each of `tasks`, and what they were built from.

    Raises:
        ValueError: The file has not all of them, or others than `wanted`, whose `python` does not matter.
    """
    head, contexts, *entries = read_lines(path)
    origin = Origin(**head)
    if replace(origin, python=wanted.python) != wanted:
        raise ValueError(f"{path} holds samples of {origin}; asked for: {wanted}")
    found = {
        (task, index): msgspec.convert(fields | {"context": contexts[fields["context_id"]]}, Sample)
        for task, index, fields in entries
    }
    keys = [(task, index) for task in tasks for index in range(count)]
    if missing := [key for key in keys if key not in found]:
        task, index = missing[0]
        raise ValueError(f"{path} lacks sample {index} of {task}: delete it, or ask for fewer")
    return origin, {key: found[key] for key in keys}
