"""A plugin for pytest that notes which kernels each test launched, and how the test ended.

python -m pytest -p tests.kernels.ran --kernels-ran FILE ...
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kernels-ran", help="file for kernel -> [tests passed, tests failed]")


class Ran:
    """kernel -> [passed, failed]; `names`: those of the test that runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: set[str] = set()
        self.counts: dict[str, list[int]] = {}

    def noting(self, plain: Any) -> Any:
        def launch(function: Any, grid: Any) -> Any:
            self.names.add(_name(function))
            return plain(function, grid)

        return launch

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: Any) -> Iterator[None]:
        report: Any = yield
        if report.when == "call" and not report.skipped:
            for name in self.names or {"no kernel"}:
                self.counts.setdefault(name, [0, 0])[report.failed] += 1
            self.names.clear()
        return report

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(json.dumps(self.counts), "utf-8")


def _name(function: Any) -> str:
    plain = getattr(function, "fn", function)
    module = str(plain.__module__).removeprefix("attnbias.kernels.")
    return f"{module}.{plain.__name__}"


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--kernels-ran")
    if not path:
        return
    from triton.runtime import interpreter, jit

    ran = Ran(Path(path))
    for kind in (jit.KernelInterface, interpreter.InterpretedFunction):
        if "__getitem__" in vars(kind):  # interpreted functions inherit it since Triton 3.6
            kind.__getitem__ = ran.noting(kind.__getitem__)
    config.pluginmanager.register(ran, "kernels-ran")
