"""vLLM's Python tree, read as text: what stands where. Nothing of it is imported."""

from __future__ import annotations

import ast
import copy
import difflib
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

Function = (ast.FunctionDef, ast.AsyncFunctionDef)
_KINDS = ("classmethod", "staticmethod", "property")
_OF_PYTHON = {"Enum": ("name", "value"), "NamedTuple": ("_asdict", "_replace")}


@dataclass(frozen=True)
class Found:
    """A module, or a name in one, where it is defined: re-exports were followed."""

    module: str
    name: str  # within the module; empty for the module itself
    node: ast.AST

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}" if self.name else self.module

    @property
    def place(self) -> str:
        line = getattr(self.node, "lineno", 1)
        return f"{self.module.replace('.', '/')}.py:{line}"


class Tree:
    """One version of vLLM.

    Args:
        root: The folder that holds ``vllm/``.
        label: How messages call this version; by default after the version that the tree itself names.
    """

    def __init__(self, root: Path, label: str = "") -> None:
        self.root = root
        self.label = label or f"vLLM {self.version}"
        self._modules: dict[str, Found | None] = {}
        self._scopes: dict[str, dict[str, ast.AST | str]] = {}

    @cached_property
    def version(self) -> str:
        """``0.33.0``, as ``vllm/_version.py`` has it."""
        for node in ast.parse((self.root / "vllm" / "_version.py").read_text()).body:
            if isinstance(node, ast.Assign) and "version" in map(ast.unparse, node.targets):
                return ast.literal_eval(node.value)
        raise ValueError(f"no version in {self.root}/vllm/_version.py")

    def module(self, dotted: str) -> Found | None:
        """The module or package `dotted`; None where there is none."""
        if dotted not in self._modules:
            base = self.root.joinpath(*dotted.split("."))
            files = [file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()]
            parsed = Found(dotted, "", _parse(files[0].resolve())) if files else None
            self._modules[dotted] = parsed
        return self._modules[dotted]

    def find(self, dotted: str) -> Found | None:
        """A module, a name in one, or a member of a class; None where there is nothing."""
        parts = dotted.split(".")
        for end in range(len(parts), 0, -1):
            found = self.module(".".join(parts[:end]))
            if found is None:
                continue
            for name in parts[end:]:
                found = self.member(found, name)
                if found is None:
                    return None
            return found
        return None

    def member(self, owner: Found, name: str) -> Found | None:
        """`name` in a module, or in a class or its ancestors."""
        if isinstance(owner.node, ast.Module):
            what = self._scope(owner).get(name)
            if isinstance(what, ast.AST):
                return Found(owner.module, name, what)
            # Imported, or a submodule.
            return self.find(what) if what else self.module(f"{owner.module}.{name}")
        for found in self.lineage(owner):
            what = names_in(found.node.body).get(name)
            if isinstance(what, ast.AST):
                return Found(found.module, f"{found.name}.{name}", what)
        return None

    def lineage(self, owner: Found) -> list[Found]:
        """A class of vLLM and its ancestors in vLLM, nearest first."""
        lineage: list[Found] = []
        waiting = [owner]
        while waiting:
            found = waiting.pop(0)
            if isinstance(found.node, ast.ClassDef) and found not in lineage:
                lineage.append(found)
                waiting += filter(None, (self._base(found, node) for node in found.node.bases))
        return lineage

    def _base(self, owner: Found, node: ast.expr) -> Found | None:
        base = node.value if isinstance(node, ast.Subscript) else node  # Generic[T]
        found = self.module(owner.module)
        for name in ast.unparse(base).split("."):
            found = self.member(found, name) if found else None
        return found

    def bases(self, owner: Found) -> set[str]:
        """Last names of all ancestors, those outside vLLM included."""
        written = {ast.unparse(base) for found in self.lineage(owner) for base in found.node.bases}
        return {base.split("[")[0].rsplit(".", 1)[-1] for base in written}

    def attributes(self, owner: Found) -> dict[str, ast.AST]:
        """What an instance has: the class bodies of its lineage, and what they assign to ``self``."""
        inherited = (_OF_PYTHON.get(base, ()) for base in self.bases(owner))
        attributes: dict[str, ast.AST] = {name: owner.node for names in inherited for name in names}
        for found in self.lineage(owner):
            for name, node in names_in(found.node.body).items():
                attributes.setdefault(name, node)
            for name, node in assigned_to_self(found.node).items():
                attributes.setdefault(name, node)
        return attributes

    def fields(self, owner: Found) -> list[str]:
        """Fields of a dataclass or NamedTuple, those of its ancestors included; empty for other classes."""
        lineage = self.lineage(owner)
        decorators = [ast.unparse(d).split("(")[0] for found in lineage for d in found.node.decorator_list]
        if not {"dataclass", "config"} & set(decorators) and "NamedTuple" not in self.bases(owner):
            return []
        return [
            name
            for found in lineage
            for name, node in names_in(found.node.body).items()
            if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation)
        ]

    def constructor(self, owner: Found) -> ast.FunctionDef | None:
        """``__init__``, also the one that a dataclass gets; None for other classes without one."""
        if found := self.member(owner, "__init__"):
            return found.node if isinstance(found.node, ast.FunctionDef) else None
        nodes = {name: self.member(owner, name) for name in self.fields(owner)}
        args = [f"{name}=..." if found and found.node.value else name for name, found in nodes.items()]
        return ast.parse(f"def __init__(self, {', '.join(args)}): ...").body[0] if args else None

    def near(self, dotted: str) -> str:
        """What is there instead of `dotted`: similar names in the same place."""
        where, _, name = dotted.rpartition(".")
        owner = self.find(where)
        if owner is None:
            return self.near(where) if where else "nothing"
        names = self._scope(owner) if isinstance(owner.node, ast.Module) else self.attributes(owner)
        close = [describe(match, names[match]) for match in difflib.get_close_matches(name, names, n=2)]
        hint = f"; near: {', '.join(close)}" if close else ""
        return f"no {name} in {owner.path} [{owner.place}]{hint}"

    def _scope(self, module: Found) -> dict[str, ast.AST | str]:
        if module.module not in self._scopes:
            is_package = not self.root.joinpath(*module.module.split(".")).with_suffix(".py").is_file()
            package = module.module if is_package else module.module.rpartition(".")[0]
            self._scopes[module.module] = names_in(module.node.body, package)
        return self._scopes[module.module]


@cache
def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def names_in(body: list[ast.stmt], package: str = "") -> dict[str, ast.AST | str]:
    """Names that `body` binds: to their definition, or to the dotted name that they import."""
    names: dict[str, ast.AST | str] = {}

    def bind(name: str, what: ast.AST | str) -> None:
        names.setdefault(name, what)  # the first counts: TYPE_CHECKING and try stand above their substitutes

    for node in body:
        if isinstance(node, (ast.ClassDef, *Function)):
            if "overload" not in map(ast.unparse, node.decorator_list):
                bind(node.name, node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                bind(ast.unparse(target), node)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                bind(alias.asname or alias.name, f"{origin}.{alias.name}")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                bind(alias.asname or alias.name.split(".")[0], alias.name if alias.asname else "")
        elif isinstance(node, ast.If | ast.Try | ast.With):
            blocks = [node.body, *(handler.body for handler in getattr(node, "handlers", []))]
            blocks += [getattr(node, "orelse", []), getattr(node, "finalbody", [])]
            for name, what in names_in([part for block in blocks for part in block], package).items():
                bind(name, what)
    return names


def assigned_to_self(node: ast.AST) -> dict[str, ast.AST]:
    """Attributes that the methods of a class set, by name."""
    stores = (
        part for part in ast.walk(node) if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store)
    )
    return {part.attr: part for part in stores if ast.unparse(part.value) == "self"}


def describe(name: str, node: ast.AST | str) -> str:
    """A name as a message shows it: with its signature, if it has one."""
    return signature(node) if isinstance(node, Function) else name


def kind(node: ast.AST) -> str:
    """``classmethod``, ``staticmethod``, ``property`` or, for other functions, nothing."""
    decorators = {ast.unparse(decorator).rsplit(".", 1)[-1] for decorator in node.decorator_list}
    return next((name for name in _KINDS if any(name in decorator for decorator in decorators)), "")


def signature(node: ast.AST) -> str:
    """``@classmethod customize_spec(cls, spec)``: kind, names and defaults; no annotations."""
    args = copy.deepcopy(node.args)
    for arg in ast.walk(args):
        if isinstance(arg, ast.arg):
            arg.annotation = None
    prefix = f"@{kind(node)} " if kind(node) else ""
    return f"{prefix}{node.name}({ast.unparse(args)})"
