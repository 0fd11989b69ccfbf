"""Real text that ships with every Python, and names for facts that nobody can know without reading them.

Chapters of the language reference come from ``pydoc_data.topics``, source and docstrings from the standard
library; both under the Python Software Foundation License. They differ a little between versions of Python,
which is why results name theirs.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

PRIVATE = ("test", "site-packages", "idlelib", "lib2to3", "encodings", "pydoc_data", "tkinter", "distutils")

MIN_DESCRIPTION, MAX_DESCRIPTION = 400, 1_200  # characters, as the two below
MIN_SUMMARY, MAX_SUMMARY = 20, 200


@dataclass(frozen=True)
class Chapter:
    """A chapter of the language reference."""

    title: str
    paragraphs: tuple[str, ...]


@dataclass(frozen=True)
class Module:
    """A module of the standard library.

    Attributes:
        name: As one imports it.
        source: Its text.
        summary: The first sentence or lines of its docstring; empty without one.
        members: Name and docstring of every function and class that has one, in the order of the file.
    """

    name: str
    source: str
    summary: str
    members: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Document:
    """What the docstrings of a module say.

    Attributes:
        name: The module's name.
        summary: What its docstring begins with.
        description: What its functions and classes do, without the summary.
    """

    name: str
    summary: str
    description: str


@cache
def chapters() -> tuple[Chapter, ...]:
    """All chapters, by title. Some are also part of a longer one: every paragraph is in one only."""
    seen: set[str] = set()
    found = {}
    for text in sorted(set(topics.values()), key=len, reverse=True):
        title, _, body = text.strip().partition("\n")
        paragraphs = dict.fromkeys(part.strip("\n") for part in body.split("\n\n") if part.strip("*=-~ \n"))
        new = tuple(paragraph for paragraph in paragraphs if paragraph not in seen)
        seen.update(new)
        if new:
            found[title] = Chapter(title.replace('"', ""), new)
    return tuple(found[title] for title in sorted(found))


@cache
def words() -> tuple[str, ...]:
    """Distinct words of five to nine small letters in the language reference, in order."""
    return tuple(sorted(set(re.findall(r"\b[a-z]{5,9}\b", "\n".join(topics.values())))))


@cache
def modules() -> tuple[Module, ...]:
    """The standard library's Python modules without its private ones, by name."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = {path.relative_to(root).with_suffix(""): path for path in root.rglob("*.py")}
    names = {".".join(parts.parts): path for parts, path in paths.items() if _is_public(parts.parts)}
    return tuple(_read(name, names[name]) for name in sorted(names))


@cache
def described_modules() -> tuple[Document, ...]:
    """Documents of a page at most, one per module whose docstrings make one, by name."""
    documents = []
    for module in modules():
        text = ""
        for name, docstring in module.members:
            line = f"{name}: {' '.join(docstring.partition(chr(10) * 2)[0].split())}\n"
            text += line if len(text) + len(line) <= MAX_DESCRIPTION and module.summary not in line else ""
        if len(text) >= MIN_DESCRIPTION and MIN_SUMMARY <= len(module.summary) <= MAX_SUMMARY:
            documents.append(Document(module.name, module.summary, text))
    return tuple(documents)


def _is_public(parts: tuple[str, ...]) -> bool:
    return not any(part.startswith("_") or part in PRIVATE for part in parts)


def _read(name: str, path: Path) -> Module:
    source = path.read_text(encoding="utf-8", errors="replace")
    tree = ast.parse(source)
    members = [
        (node.name, text)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and (text := ast.get_docstring(node))
    ]
    summary = " ".join((ast.get_docstring(tree) or "").partition("\n\n")[0].split())
    return Module(name, source, summary, tuple(members))
