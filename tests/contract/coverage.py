"""Whether the contract has an entry for everything that vllm_quest uses of vLLM."""

from __future__ import annotations

import ast

from tests.contract.ours import Use, call_shape
from tests.contract.reliance import Contract, On
from tests.contract.tree import Tree


def missing(uses: list[Use], contract: Contract, tree: Tree) -> list[Use]:
    """The uses without an entry under their file."""
    paths = {entry.name: _path(tree, entry.name) for entries in contract.values() for entry in entries}
    return [use for use in uses if not _covered(use, contract.get(use.file, ()), paths)]


def _path(tree: Tree, name: str) -> str:
    found = tree.find(name)
    return found.path if found else name


def _covered(use: Use, entries: tuple[On, ...], paths: dict[str, str]) -> bool:
    if not use.member:
        (name,) = use.names
        mine = [entry for entry in entries if paths[entry.name] == name]
        if use.call is not None:
            return any(use.call in _calls(entry, name) for entry in mine)
        return bool(mine) or any(paths[entry.name].startswith(f"{name}.") for entry in entries)
    if use.member.startswith("__") and not use.replaces:
        return True  # Python's own, and super().__init__, which the override stands for
    if any(paths[entry.name] in {f"{name}.{use.member}" for name in use.names} for entry in entries):
        return True
    mine = [entry for entry in entries if paths[entry.name] in use.names]
    if use.replaces:
        return any(use.member in _names(entry.declared + entry.attributes) for entry in mine)
    calls = [call for entry in mine for call in _calls(entry, use.member)]
    if use.call is not None and calls:
        return use.call in calls
    parts = ("attributes", "fields", "called", "declared", "members")
    return any(use.member in _names(getattr(entry, part)) for entry in mine for part in parts)


def _names(texts: tuple[str, ...]) -> set[str]:
    """The names in entries like ``seq_lens: torch.Tensor``, ``NEVER = 0``, ``@classmethod build(cls)``."""
    return {text.split("(")[0].split(":")[0].split(" =")[0].split()[-1] for text in texts}


def _calls(entry: On, name: str) -> list:
    calls = [ast.parse(text, mode="eval").body for text in entry.called]
    return [call_shape(call) for call in calls if ast.unparse(call.func) == name.rsplit(".", 1)[-1]]
