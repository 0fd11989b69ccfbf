"""Holds one version of vLLM against the contract."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from tests.contract.reliance import Contract, On
from tests.contract.tree import Found, Function, Tree, describe, kind, signature


@dataclass(frozen=True)
class Breach:
    """Something that we rely on and this version does not have."""

    version: str
    name: str
    file: str
    relied_on: str
    there_is: str
    why: str

    def __str__(self) -> str:
        why = f" ({self.why})" if self.why else ""
        return (
            f"{self.version}: {self.name}\n"
            f"    we rely on   {self.relied_on}\n"
            f"    there is     {self.there_is}\n"
            f"    relied on by {self.file}{why}"
        )


def breaches(tree: Tree, contract: Contract) -> list[Breach]:
    """Everything in `contract` that `tree` does not keep."""
    return [
        Breach(tree.label, entry.name, file, relied_on, there_is, entry.why)
        for file, entries in contract.items()
        for entry in entries
        for relied_on, there_is in _broken(tree, entry)
    ]


def size(contract: Contract) -> int:
    """How many single things `contract` relies on."""
    parts = ("bases", "members", "attributes", "fields", "called", "declared", "code")
    return sum(
        1 + sum(len(getattr(entry, part)) for part in parts) + (entry.value is not None)
        for entries in contract.values()
        for entry in entries
    )


def _broken(tree: Tree, entry: On) -> Iterator[tuple[str, str]]:
    """Pairs of what we rely on and what is there."""
    found = tree.find(entry.name)
    if entry.since and _numbers(tree.version) < _numbers(entry.since):
        if found is not None:
            yield f"its absence before {entry.since}: we probe for it", found.place
        return
    if found is None:
        yield "the name", tree.near(entry.name)
        return
    if entry.value is not None and _value(found.node) != repr(entry.value):
        yield f"the value {entry.value!r}", f"{_value(found.node)} [{found.place}]"
    for check in (_bases, _members, _attributes, _fields, _called, _declared, _code):
        yield from check(tree, entry, found)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _value(node: ast.AST) -> str:
    value = getattr(node, "value", None)
    return ast.unparse(value) if value is not None else ast.unparse(node).split("\n")[0]


def _bases(tree: Tree, entry: On, found: Found) -> Iterator[tuple[str, str]]:
    for base in entry.bases:
        if base not in tree.bases(found):
            yield f"the base class {base}", f"{', '.join(sorted(tree.bases(found)))} [{found.place}]"


def _members(tree: Tree, entry: On, found: Found) -> Iterator[tuple[str, str]]:
    for member in entry.members:
        name, _, value = member.partition(" = ")
        node = tree.member(found, name)
        if node is None:
            yield f"the member {member}", tree.near(f"{entry.name}.{name}")
        elif value and _value(node.node) != value:
            yield f"the member {member}", f"{name} = {_value(node.node)} [{node.place}]"


def _attributes(tree: Tree, entry: On, found: Found) -> Iterator[tuple[str, str]]:
    present = tree.attributes(found)
    for attribute in entry.attributes:
        name, _, annotation = attribute.partition(": ")
        if name not in present:
            yield f"the attribute {attribute}", tree.near(f"{entry.name}.{name}")
        elif annotation:
            node = present[name]
            written = getattr(node, "returns", None) or getattr(node, "annotation", None)
            if written is None or ast.unparse(written) != annotation:
                there = f"{name}: {ast.unparse(written) if written else 'no annotation'}"
                yield f"the attribute {attribute}", f"{there} [{found.place}]"


def _fields(tree: Tree, entry: On, found: Found) -> Iterator[tuple[str, str]]:
    present = tree.fields(found)
    for field in entry.fields:
        if field not in present:
            fields = f"fields {', '.join(present)}" if present else "not a dataclass or NamedTuple"
            yield f"the field {field}", f"{fields} [{found.place}]"


def _declared(tree: Tree, entry: On, found: Found) -> Iterator[tuple[str, str]]:
    for text in entry.declared:
        name = text.split("(")[0].split()[-1]
        method = tree.member(found, name)
        if method is None:
            yield text, tree.near(f"{entry.name}.{name}")
        elif not isinstance(method.node, Function) or signature(method.node) != _normal(text):
            yield text, f"{describe(name, method.node)} [{method.place}]"


def _normal(text: str) -> str:
    """`text` as `signature` writes it."""
    *decorator, plain = text.split(" ", 1) if text.startswith("@") else [text]
    (function,) = ast.parse("\n".join([*decorator, f"def {plain}: ..."])).body
    return signature(function)


def _called(tree: Tree, entry: On, found: Found) -> Iterator[tuple[str, str]]:
    for text in entry.called:
        call = ast.parse(text, mode="eval").body
        assert isinstance(call, ast.Call), f"{entry.name}: {text} is not a call"
        name = ast.unparse(call.func)
        is_itself = name == entry.name.rsplit(".", 1)[-1]
        target = found if is_itself else tree.member(found, name)
        function = target.node if target else None
        if isinstance(function, ast.ClassDef):
            function = tree.constructor(target)
        if not isinstance(function, Function):
            yield text, tree.near(entry.name if is_itself else f"{entry.name}.{name}")
        elif problem := misfit(call, function, tree):
            yield f"{text}: {problem}", f"{signature(function)} [{target.place}]"


def misfit(call: ast.Call, function: ast.FunctionDef, tree: Tree) -> str:
    """Why `function` does not take `call`; empty where it does."""
    args = function.args
    positional = [arg.arg for arg in args.posonlyargs + args.args]
    if positional[:1] in (["self"], ["cls"]) and kind(function) != "staticmethod":
        positional = positional[1:]
    named = [arg.arg for arg in args.kwonlyargs]
    given = [ast.unparse(arg) for arg in call.args]
    keywords: list[str] = []
    for keyword in call.keywords:
        if keyword.arg:
            keywords.append(keyword.arg)
        else:
            spread = tree.find(ast.unparse(keyword.value))
            keywords += tree.fields(spread) if spread else [f"**{ast.unparse(keyword.value)}"]
    for index, name in enumerate(given):
        if index < len(positional):
            if positional[index] != name:
                return f"argument {index + 1} is not {name}"
        elif not args.vararg:
            return f"takes no argument {index + 1} ({name})"
    for name in keywords:
        if name not in positional + named and not args.kwarg:
            return f"takes no {name}"
    required = positional[: len(positional) - len(args.defaults)]
    required += [
        arg.arg for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True) if not default
    ]
    missing = [name for name in required if name not in given + keywords]
    return f"wants {', '.join(missing)}" if missing else ""


def _code(tree: Tree, entry: On, found: Found) -> Iterator[tuple[str, str]]:
    for text in entry.code:
        (wanted,) = ast.parse(text).body
        wanted = wanted.value if isinstance(wanted, ast.Expr) else wanted
        present = [ast.unparse(node) for node in ast.walk(found.node) if type(node) is type(wanted)]
        if ast.unparse(wanted) not in present:
            name = text.split("(")[0].split(" = ")[-1].rsplit(".", 1)[-1]
            near = [code for code in present if name in code and "\n" not in code]
            there = f"; near: {min(near, key=len)}" if near else ""
            yield f"the code {text}", f"nothing like it [{found.place}]{there}"
