"""All benchmarks in order: `python -m benchmarks [--quick]`; a failure does not stop the rest."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from benchmarks.common import ROOT

ORDER = ("benchmarks.attention_cpu", "benchmarks.memory_cpu", "benchmarks.observe")


def main(arguments: Sequence[str]) -> int:
    """Each in a process of its own: none inherits another's memory, threads or compiled code."""
    if unknown := [word for word in arguments if word != "--quick"]:
        print(
            f"python -m benchmarks takes only --quick, got {' '.join(unknown)}; "
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
