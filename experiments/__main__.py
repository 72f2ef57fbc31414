"""``python -m experiments [ID ...]``: run experiments and write their results (all by default)."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence

import experiments
from experiments.common import Experiment, record


def found() -> dict[str, Experiment]:
    """Every experiment of this folder, by the id of its work."""
    names = [m.name for m in pkgutil.iter_modules(experiments.__path__)]
    modules = [importlib.import_module(f"experiments.{name}") for name in names if name[0] != "_"]
    parts = [getattr(module, "EXPERIMENT", None) for module in modules]
    return {part.work: part for part in parts if isinstance(part, Experiment)}


def main(given: Sequence[str] | None = None) -> int:
    from rich.progress import Progress

    known = found()
    parser = argparse.ArgumentParser(prog="experiments", description=__doc__)
    parser.add_argument("ids", nargs="*", metavar="ID", help=f"one of {', '.join(known)}")
    chosen = parser.parse_args(given).ids or list(known)
    for name in chosen:
        if name not in known:
            parser.error(f"there is no experiment {name!r}")
    with Progress(transient=True) as bar:
        for name in chosen:
            task = bar.add_task(name, total=len(known[name].seeds))
            result = known[name].run(lambda task=task: bar.advance(task))  # type: ignore[misc]
            path = record(known[name], result)
            word = "holds" if result["passed"] else "does not hold"
            print(f"{name}: {word}, gain {result['gain']:.4g} ± {result['error']:.2g}: {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
