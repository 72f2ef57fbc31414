"""All benchmarks in order: `python -m benchmarks [--quick | --list]`.

A failure does not stop the rest. `--list` names them and runs nothing.
"""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import ROOT

ORDER = (
    "benchmarks.attention_cpu",
    "benchmarks.memory_cpu",
    "benchmarks.structures",
    "benchmarks.growth",
    "benchmarks.memory_structures",
    "benchmarks.flashbias_shapes",
    "benchmarks.bsa_slice",
    "benchmarks.bsa_tnp",
    "benchmarks.neural_process",
    "benchmarks.music",
    "benchmarks.fold_precision",
    "benchmarks.stability",
    "benchmarks.planner",
    "benchmarks.kernels",
    "benchmarks.flex_kernels",
    "benchmarks.observe",
    "benchmarks.observe_peers",
    "benchmarks.steer",
    "benchmarks.steer_tokens",
    "benchmarks.fuse",
    "benchmarks.page",
    "benchmarks.solver",
)


def main(arguments: Sequence[str]) -> int:
    """Each in a process of its own: none inherits another's memory, threads or compiled code."""
    if list(arguments) == ["--list"]:
        for module in ORDER:
            spec = importlib.util.find_spec(module)
            source = ast.parse(Path(str(spec and spec.origin)).read_text(encoding="utf-8"))
            print(f"python -m {module:<30} {(ast.get_docstring(source) or '').splitlines()[0]}")
        return 0
    if unknown := [word for word in arguments if word != "--quick"]:
        print(
            f"python -m benchmarks takes only --quick or --list, got {' '.join(unknown)}; "
            f"for more, call one of {', '.join(ORDER)}",
            file=sys.stderr,
        )
        return 2
    failed = []
    for module in ORDER:
        print(f"== {module}", flush=True)
        if subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT).returncode:
            failed.append(module)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
