"""Public names say what they are, and a default that a docstring names is the default."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import attnbias as ab
from tests.conftest import ROOT
from tests.house.files import python_files

NAMED = re.compile(r"^\s*(\w+)(?: \([^)]*\))?:(.*?)(?=^\s*\w+(?: \([^)]*\))?:|\Z)", re.M | re.S)
DEFAULT = re.compile(
    r"\b(?:default(?:s to| is)?:?|by default)\s+(``[^`]+``|`[^`]+`|[\w.+-]+)", re.I
)


def things(name: str) -> list[tuple[str, object]]:
    """A public name's object, and for rooms that hold classes (forms, rules) each of those."""
    thing = getattr(ab, name)
    inside = [(f"{name}.{n}", getattr(thing, n)) for n in getattr(thing, "__all__", ())]
    return [(name, thing), *inside]


@pytest.mark.parametrize("name", sorted(ab.__all__))
def test_public_names_have_docstrings(name: str) -> None:
    for label, thing in things(name):
        if isinstance(thing, str | tuple | dict):
            continue
        text = inspect.getdoc(thing) or ""
        assert len(text) > 20, f"{label} has no docstring"
        # A dataclass without a docstring gets its signature as one.
        assert not text.startswith(f"{label.rpartition('.')[2]}("), f"{label} has no docstring"


def functions(tree: ast.Module) -> list[tuple[str, str, dict[str, ast.expr]]]:
    """(name, docstring, defaults) of functions, and of classes by fields or `__init__`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.append((node.name, ast.get_docstring(node) or "", _defaults(node.args)))
        if isinstance(node, ast.ClassDef):
            values: dict[str, ast.expr] = {}
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and item.value is not None:
                    values[ast.unparse(item.target)] = item.value
                if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                    values |= _defaults(item.args)
            found.append((node.name, ast.get_docstring(node) or "", values))
    return found


def _defaults(arguments: ast.arguments) -> dict[str, ast.expr]:
    plain = [*arguments.posonlyargs, *arguments.args]
    pairs = list(zip(reversed(plain), reversed(arguments.defaults), strict=False))
    pairs += [(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d]
    return {argument.arg: default for argument, default in pairs}


def wrong_defaults(text: str) -> list[str]:
    """What a file's docstrings say about literal defaults and its signatures do not."""
    wrong = []
    for name, doc, values in functions(ast.parse(text)):
        for argument, words in NAMED.findall(doc):
            said = DEFAULT.search(words)
            if argument not in values or said is None:
                continue
            try:
                told = ast.literal_eval(said.group(1).strip("`").rstrip("."))
                is_ = ast.literal_eval(values[argument])
            except (ValueError, SyntaxError):
                continue  # one of the two is an expression in words
            if told != is_:
                wrong.append(f"{name}({argument}): docstring says {told!r}, signature {is_!r}")
    return wrong


@pytest.mark.parametrize("path", python_files("attnbias"), ids=lambda p: str(p.relative_to(ROOT)))
def test_defaults_said_are_the_defaults(path: Path) -> None:
    assert not wrong_defaults(path.read_text(encoding="utf-8"))


def test_the_default_test_can_fail() -> None:
    text = 'def f(a=1, *, b=2):\n    """F.\n\n    Args:\n        a: one, default {}.\n    """\n'
    assert wrong_defaults(text.format(3)) == ["f(a): docstring says 3, signature 1"]
    assert not wrong_defaults(text.format(1))
