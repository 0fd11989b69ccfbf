"""What several command lines take alike: their form, types of arguments, and parents of their parsers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.common.machine import program

__all__ = ["command_line", "json_object", "of_experiment", "of_model", "of_results", "of_samples"]


def command_line(
    description: str | None, *parents: argparse.ArgumentParser, command: str = ""
) -> argparse.ArgumentParser:
    """The command line of the running program, or of its subcommand `command`.

    Args:
        description: A module's docstring, shown as it is.
        parents: Whose arguments it has, too.
        command: Empty for the program itself.
    """
    return argparse.ArgumentParser(
        prog=f"{program()} {command}".rstrip(),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=parents,
    )


def json_object(text: str) -> dict[str, Any]:
    """A type of argument: fields of a configuration, or keyword arguments.

    Raises:
        argparse.ArgumentTypeError: Not a JSON object.
    """
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(entries, dict):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a JSON object")
    return entries


def of_model() -> argparse.ArgumentParser:
    """Which model is measured."""
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument("--model", metavar="MODEL", help="folder or name; default: SmolLM2-135M-Instruct")
    return parent


def of_results() -> argparse.ArgumentParser:
    """The file of a `ResultsFile`, and how long it may grow."""
    parent = argparse.ArgumentParser(add_help=False)
    add = parent.add_argument
    add("--json", type=Path, help="results; what is in it is not measured again")
    add(
        "--minutes",
        type=float,
        default=float("inf"),
        help="start nothing new after that; 0 only prints --json",
    )
    return parent


def of_samples(context: int) -> argparse.ArgumentParser:
    """Which samples of which model are measured, and where the scores go; `context` is the default."""
    parent = argparse.ArgumentParser(add_help=False, parents=[of_model()])
    add = parent.add_argument
    add("--context", type=int, default=context, metavar="N", help="tokens; default: %(default)s")
    add("--samples", type=int, default=50, metavar="N", help="per task; default: %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="of the tasks; default: %(default)s")
    add("--out", type=Path, required=True, metavar="FOLDER", help="raw results, only ever added to")
    return parent


def of_experiment() -> argparse.ArgumentParser:
    """`of_samples`, what is configured alike in all that is compared, and the file of findings."""
    parent = argparse.ArgumentParser(add_help=False, parents=[of_samples(2048)])
    add = parent.add_argument
    add("--quest", type=json_object, default={}, metavar="JSON", help="what else is configured")
    add("--json", type=Path, required=True, dest="json_path", metavar="PATH", help="what was found")
    return parent
