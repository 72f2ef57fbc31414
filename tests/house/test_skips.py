"""No skip without a reason in tests/SKIPS.md."""

from __future__ import annotations

import ast
import re

from tests.conftest import ROOT
from tests.house.files import python_files

LISTED = re.findall(
    r"^\| (?!message begins|---)([^|]+?) \|",
    (ROOT / "tests/SKIPS.md").read_text("utf-8"),
    flags=re.M,
)


def skips(text: str) -> list[tuple[int, str | None]]:
    """(line, message) of every skip, skipif, xfail or importorskip; None: no literal message."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if isinstance(node.func, ast.Name):
            name = node.func.id
        if name not in ("skip", "skipif", "xfail", "importorskip", "skipTest", "SkipTest"):
            continue
        wanted = [k.value for k in node.keywords if k.arg in ("reason", "msg")]
        wanted += [a for a in node.args if name in ("skip", "xfail", "skipTest", "SkipTest")][:1]
        found.append((node.lineno, _start(wanted[0]) if wanted else None))
    return found


def _start(node: ast.expr) -> str | None:
    """The literal beginning of a message."""
    if isinstance(node, ast.JoinedStr) and node.values:
        node = node.values[0]
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def test_every_skip_is_listed() -> None:
    assert LISTED
    for path in python_files("tests"):
        for line, message in skips(path.read_text(encoding="utf-8")):
            good = message is not None and message.startswith(tuple(LISTED))
            assert good, f"{path.relative_to(ROOT)}:{line} skips with {message!r}: no row for it"


def test_every_row_is_used() -> None:
    files = [path.read_text(encoding="utf-8") for path in python_files("tests")]
    said = [message or "" for text in files for _, message in skips(text)]
    for reason in LISTED:
        assert any(message.startswith(reason) for message in said), f"no test skips with {reason!r}"


def test_the_skip_test_can_fail() -> None:
    assert skips("import pytest\npytest.skip('no reason at all')") == [(2, "no reason at all")]
    assert skips("@pytest.mark.skipif(True, reason=f'shared data {x}')\ndef f(): ...") == [
        (1, "shared data ")
    ]
    assert skips("pytest.importorskip('altair')") == [(1, None)]
