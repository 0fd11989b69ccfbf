"""Arguments that several command lines here take alike: parents of their parsers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

__all__ = ["of_experiment", "of_samples"]


def of_samples(context: int) -> argparse.ArgumentParser:
    """Which samples of which model are measured, and where the scores go; `context` is the default."""
    parent = argparse.ArgumentParser(add_help=False)
    add = parent.add_argument
    add("--model", metavar="MODEL", help="folder or name; default: SmolLM2-135M-Instruct")
    add("--context", type=int, default=context, metavar="N", help="tokens; default: %(default)s")
    add("--samples", type=int, default=50, metavar="N", help="per task; default: %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="of the tasks; default: %(default)s")
    add("--out", type=Path, required=True, metavar="FOLDER", help="raw results, only ever added to")
    return parent


def of_experiment() -> argparse.ArgumentParser:
    """`of_samples`, what is configured alike in all that is compared, and the file of findings."""
    parent = argparse.ArgumentParser(add_help=False, parents=[of_samples(2048)])
    add = parent.add_argument
    add("--quest", type=json.loads, default={}, metavar="JSON", help="what else is configured")
    add("--json", type=Path, required=True, dest="json_path", metavar="PATH", help="what was found")
    return parent
