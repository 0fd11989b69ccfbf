"""What vllm_quest uses of vLLM, read from its source.

Found are imports and calls of what was imported; methods and attributes that replace vLLM's; attributes read
on ``self``, ``cls`` and ``super()`` that are not our own; and attributes of arguments and variables whose
type the annotations tell, ours and vLLM's. Not found is what has none, like an element of a dictionary.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.contract.tree import Found, Function, Tree, assigned_to_self, kind, names_in, signature

OUR_PACKAGE = "vllm_quest"
Call = tuple[int, frozenset[str]]  # how many positional arguments, which keywords


@dataclass(frozen=True)
class Use:
    """One thing of vLLM that one file of ours uses.

    Attributes:
        file: Ours.
        line: Where.
        names: vLLM's name; for a member, those of the class and of its ancestors, nearest first.
        member: What of it; empty where the name itself is meant.
        replaces: We define the member anew.
        call: How it is called; None where it is not called, or with ``*``.
    """

    file: str
    line: int
    names: tuple[str, ...]
    member: str = ""
    replaces: bool = False
    call: Call | None = None

    def __str__(self) -> str:
        what = f"{self.names[0]}.{self.member}" if self.member else self.names[0]
        call = f" with {self.call[0]} positional arguments and {sorted(self.call[1])}" if self.call else ""
        return f"{self.file}:{self.line} {'replaces' if self.replaces else 'uses'} {what}{call}"


@dataclass(frozen=True)
class Override:
    """A method of ours in the place of one of vLLM's."""

    place: str
    ours: ast.FunctionDef
    theirs: Found

    def misfit(self) -> str:
        """Why vLLM cannot call ours as it calls its own; empty where it can."""
        mine, base = self.ours.args, self.theirs.node.args
        if kind(self.ours) != kind(self.theirs.node):
            # A classmethod where vLLM has a staticmethod, or the reverse, is called alike.
            if "" in (kind(self.ours), kind(self.theirs.node)):
                return f"ours is a {kind(self.ours) or 'method'}"
            skip_mine, skip_base = (kind(node) == "classmethod" for node in (self.ours, self.theirs.node))
        else:
            skip_mine = skip_base = kind(self.ours) != "staticmethod"
        names = [arg.arg for arg in mine.posonlyargs + mine.args][skip_mine:]
        wanted = [arg.arg for arg in base.posonlyargs + base.args][skip_base:]
        if not mine.vararg and names[: len(wanted)] != wanted:
            return "the arguments differ"
        if not mine.vararg and len(names) - len(mine.defaults) > len(wanted) - len(base.defaults):
            return "ours requires what is optional in vLLM"
        extra = {arg.arg for arg in base.kwonlyargs} - {arg.arg for arg in mine.kwonlyargs} - set(names)
        return f"ours does not take {', '.join(sorted(extra))}" if extra and not mine.kwarg else ""

    def __str__(self) -> str:
        return (
            f"{self.place}: {self.misfit()}\n    ours   {signature(self.ours)}\n"
            f"    vLLM's {signature(self.theirs.node)} [{self.theirs.place}]"
        )


@dataclass(frozen=True, eq=False)
class _File:
    """One file of ours, and what it imports from vLLM and from us: local name -> dotted name."""

    name: str
    module: str
    node: ast.Module
    imports: dict[str, str]
    lines: dict[str, int]

    @classmethod
    def read(cls, root: Path, path: Path) -> _File:
        node = ast.parse(path.read_text())
        imports, lines = {}, {}
        for part in ast.walk(node):
            if isinstance(part, ast.Import | ast.ImportFrom):
                for alias in part.names:
                    name = f"{part.module}.{alias.name}" if isinstance(part, ast.ImportFrom) else alias.name
                    if name.split(".")[0] in ("vllm", OUR_PACKAGE):
                        imports[alias.asname or alias.name] = name
                        lines[name] = part.lineno
        relative = path.relative_to(root)
        return cls(str(relative), ".".join(relative.with_suffix("").parts), node, imports, lines)

    def dotted(self, node: ast.AST | None) -> str:
        """The full name of an expression like ``registry.AttentionBackendEnum``; else empty."""
        first, *rest = ast.unparse(node).split(".") if isinstance(node, ast.Name | ast.Attribute) else [""]
        return ".".join([self.imports[first], *rest]) if first in self.imports else ""


@dataclass(frozen=True, eq=False)
class _Class:
    """One class of ours."""

    file: _File
    node: ast.ClassDef

    @property
    def methods(self) -> dict[str, ast.FunctionDef]:
        return {part.name: part for part in self.node.body if isinstance(part, Function)}

    @property
    def names(self) -> set[str]:
        """What it defines: methods, class attributes, and what it sets on ``self``."""
        return set(names_in(self.node.body)) | set(assigned_to_self(self.node))

    @property
    def defined(self) -> set[str]:
        """`names` without those that it only announces, like ``scale: float``."""
        body = names_in(self.node.body).items()
        bare = {name for name, node in body if isinstance(node, ast.AnnAssign) and node.value is None}
        return self.names - bare | set(assigned_to_self(self.node))


class Package:
    """The source of vllm_quest, against one version of vLLM.

    Args:
        root: The folder that holds ``vllm_quest/``.
        tree: That version.
    """

    def __init__(self, root: Path, tree: Tree) -> None:
        self.tree = tree
        self.files = [_File.read(root, path) for path in sorted((root / OUR_PACKAGE).rglob("*.py"))]
        self.classes = {
            f"{file.module}.{node.name}": _Class(file, node)
            for file in self.files
            for node in ast.walk(file.node)
            if isinstance(node, ast.ClassDef)
        }

    def uses(self) -> list[Use]:
        """Everything, each once per line."""
        found = [use for file in self.files for use in (*self._imports(file), *self._variables(file))]
        found += [use for pair in self._pairs() for use in self._in_class(*pair)]
        return list(dict.fromkeys(found))

    def overrides(self) -> list[Override]:
        """Every method of ours that stands in the place of one of vLLM's."""
        return [
            Override(f"{mine.file.name}:{method.lineno}", method, found)
            for mine, base, _ in self._pairs()
            for name, method in mine.methods.items()
            if (found := self.tree.member(base, name)) and isinstance(found.node, Function)
        ]

    def _pairs(self) -> Iterator[tuple[_Class, Found, list[_Class]]]:
        """A class of ours, a class of vLLM that it is mixed with, and all classes of ours in the mixture."""
        for composed in self.classes.values():
            ours, theirs = self._lineage(composed)
            yield from ((mine, base, ours) for mine in ours for base in theirs)

    def _lineage(self, composed: _Class) -> tuple[list[_Class], list[Found]]:
        ours, theirs = [composed], []
        for mine in ours:  # grows
            for base in mine.node.bases:
                name = mine.file.dotted(base) or f"{mine.file.module}.{ast.unparse(base)}"
                if name in self.classes:
                    ours.append(self.classes[name])
                elif found := self.tree.find(name):
                    theirs.append(found)
        return ours, theirs

    def _use(self, file: _File, node: ast.AST, owner: Found, member: str = "", **more) -> Use:
        names = [found.path for found in self.tree.lineage(owner)] if member else []
        return Use(file.name, node.lineno, tuple(names) or (owner.path,), member, **more)

    def _in_class(self, mine: _Class, base: Found, ours: list[_Class]) -> Iterator[Use]:
        theirs = self.tree.attributes(base)
        calls = _calls(mine.node)
        own = {name for part in ours for name in part.defined | part.names - set(theirs)}
        for name in mine.names & set(theirs):
            node = mine.methods.get(name, mine.node)
            yield self._use(mine.file, node, base, name, replaces=name in mine.defined)
        for part in ast.walk(mine.node):
            of = ast.unparse(part.value) if isinstance(part, ast.Attribute) else ""
            if of in ("self", "cls", "super()") and (
                part.attr not in own or (of == "super()" and part.attr in theirs)
            ):
                yield self._use(mine.file, part, base, part.attr, call=calls.get(part))

    def _imports(self, file: _File) -> Iterator[Use]:
        calls = _calls(file.node)
        for name, line in file.lines.items():
            if name.startswith("vllm."):
                found = self.tree.find(name)
                yield Use(file.name, line, (found.path if found else name,))
        for part in ast.walk(file.node):
            owner = self.tree.find(name) if (name := file.dotted(part)).startswith("vllm.") else None
            if owner is not None and part in calls:
                yield self._use(file, part, owner, call=calls[part])
            if isinstance(part, ast.Attribute) and (name := file.dotted(part.value)).startswith("vllm."):
                owner = self.tree.find(name)
                if owner is not None and isinstance(owner.node, ast.Module):
                    target = self.tree.member(owner, part.attr)
                    yield Use(file.name, part.lineno, (target.path if target else f"{name}.{part.attr}",))
                elif owner is not None:
                    owner = owner if isinstance(owner.node, ast.ClassDef) else self._annotated(owner) or owner
                    yield self._use(file, part, owner, part.attr, call=calls.get(part))

    def _variables(self, file: _File) -> Iterator[Use]:
        calls = _calls(file.node)
        for function in ast.walk(file.node):
            if not isinstance(function, Function):
                continue
            types = self._types(file, function)
            for part in ast.walk(function):
                if isinstance(part, ast.Attribute) and (owner := self._type(part.value, types)):
                    yield self._use(file, part, owner, part.attr, call=calls.get(part))

    def _types(self, file: _File, function: ast.FunctionDef) -> dict[str, Found]:
        """Arguments and variables whose type is a class of vLLM."""
        args = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        found = {arg.arg: self._class_named(file.dotted(_plain(arg.annotation))) for arg in args}
        types = {name: owner for name, owner in found.items() if owner}
        for part in ast.walk(function):
            if isinstance(part, ast.Assign):
                target, value = part.targets[0], part.value
                pairs = (
                    zip(target.elts, value.elts, strict=True)
                    if _unpacks(target, value)
                    else [(target, value)]
                )
                for name, expression in pairs:
                    owner = self._type(expression, types)
                    if isinstance(name, ast.Name) and owner:
                        types[name.id] = owner
        return types

    def _class_named(self, name: str) -> Found | None:
        found = self.tree.find(name) if name.startswith("vllm.") else None
        return found if found and isinstance(found.node, ast.ClassDef) else None

    def _type(self, node: ast.expr, types: dict[str, Found]) -> Found | None:
        """The class of vLLM that `node` is an instance of, as far as annotations tell."""
        if isinstance(node, ast.Name):
            return types.get(node.id)
        owner = self._type(node.value, types) if isinstance(node, ast.Attribute) else None
        member = self.tree.member(owner, node.attr) if owner else None
        return self._annotated(member) if member else None

    def _annotated(self, found: Found) -> Found | None:
        """The class of vLLM that the annotation of a variable, field or property names."""
        annotation = _plain(getattr(found.node, "annotation", None) or getattr(found.node, "returns", None))
        if not isinstance(annotation, ast.Name | ast.Attribute):
            return None
        named = self.tree.module(found.module)
        for name in ast.unparse(annotation).split("."):
            named = self.tree.member(named, name) if named else None
        return named if named and isinstance(named.node, ast.ClassDef) else None


def _unpacks(target: ast.expr, value: ast.expr) -> bool:
    return (
        isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts)
    )


def _plain(annotation: ast.expr | None) -> ast.expr | None:
    """`X` of ``X | None`` and of ``"X"``."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    return _plain(annotation.left) if isinstance(annotation, ast.BinOp) else annotation


def call_shape(call: ast.Call) -> Call | None:
    """How many positional arguments, and which keywords; None where ``*`` or ``**`` hides it."""
    if any(isinstance(arg, ast.Starred) for arg in call.args) or not all(key.arg for key in call.keywords):
        return None
    return len(call.args), frozenset(key.arg for key in call.keywords if key.arg)


def _calls(node: ast.AST) -> dict[ast.expr, Call | None]:
    return {part.func: call_shape(part) for part in ast.walk(node) if isinstance(part, ast.Call)}
