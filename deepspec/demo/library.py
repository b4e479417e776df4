"""The functions of the standard library: module, parameters, source and documentation of each.

The files are parsed, never imported: importing some of them opens windows, prints poems or needs
what is not installed.
"""

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

# Left out: what distributions ship separately (so that every Python has the same text), and what is
# not the library's own.
EXCLUDED = {
    "test",
    "tests",
    "site-packages",
    "dist-packages",
    "idlelib",
    "lib2to3",
    "distutils",
    "encodings",
    "ensurepip",
    "turtledemo",
    "pydoc_data",
    "tkinter",
}


class Function(NamedTuple):
    """A function, or a method of a class."""

    module: str  # "email.message"
    owner: str  # the class of a method, empty for a function
    name: str
    signature: str  # "get(self, name, default=None)"
    source: str  # normalised: no comments, no docstring
    summary: str  # first sentence of the docstring, on one line; may be empty

    @property
    def place(self) -> str:
        """Where it is found, in words."""
        module = f"the module `{self.module}`"
        return f"the class `{self.owner}` in {module}" if self.owner else module

    @property
    def kind(self) -> str:
        """`method` or `function`."""
        return "method" if self.owner else "function"


@cache
def library_functions() -> tuple[Function, ...]:
    """All functions and methods of the standard library by module and name, one per name."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[tuple[str, str, str], Function] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if EXCLUDED.isdisjoint(parts) and all(part.isidentifier() for part in parts):
            module = ".".join(part for part in parts if part != "__init__")
            for function in _functions(path, module):
                found.setdefault((module, function.owner, function.name), function)
    return tuple(found[name] for name in sorted(found))


def _functions(path: Path, module: str) -> Iterator[Function]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in a few files
        tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for owner, body in [("", tree.body), *((node.name, node.body) for node in classes)]:
        for node in body:
            if isinstance(node, ast.FunctionDef):
                yield _function(node, module, owner)


def _function(node: ast.FunctionDef, module: str, owner: str) -> Function:
    docstring = ast.get_docstring(node) or ""
    if docstring:
        node.body = node.body[1:] or [ast.Pass()]
    signature = f"{node.name}({ast.unparse(node.args)})"
    summary = first_sentence(docstring)
    return Function(module, owner, node.name, signature, ast.unparse(node), summary)


def first_sentence(docstring: str) -> str:
    """The first sentence on one line, ending with a full stop; empty if there is none."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])\s", paragraph, maxsplit=1)[0].rstrip(".:;, ")
    return f"{sentence}." if sentence and sentence.isascii() else ""
