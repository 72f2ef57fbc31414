"""Kernels of distances compiled for cards that are not there: they fit, and inner loops keep to the
registers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton: an extra where there is no GPU")

SCRIPT = """
import json, sys
import torch
import attnbias as ab
from attnbias.kernels import offline

torch.manual_seed(0)
n, heads = 1024, 4
x, y = torch.randn(n, 3), torch.randn(n, 3)
leaf = lambda *shape: torch.rand(*shape).requires_grad_()
functions = lambda d: torch.stack([torch.exp(-d * k) for k in range(1, heads + 1)])
biases = {
    "table": lambda: ab.Distance(x, y, ab.radial.Radial(functions, error=1e-4)),
    "sphere": lambda: ab.Distance(
        x[:, :2], y[:, :2], ab.radial.RBF(leaf(heads, 3), leaf(heads, 3)), metric="great_circle"
    ),
    "learned": lambda: ab.Distance(
        x.clone().requires_grad_(), y.clone().requires_grad_(),
        ab.radial.TISA(*(leaf(heads, 2) for _ in range(3))), weight=leaf(heads, n),
    ),
    "space and time": lambda: (
        ab.Distance(x, y, ab.radial.RBF(leaf(heads, 5), leaf(heads, 5)))
        + ab.Distance(x[:, :1], y[:, :1], ab.radial.RBF(leaf(heads, 3), leaf(heads, 3)),
                      metric="time", causal=True)
    ),
}
card, name = offline.CARDS[sys.argv[1]], sys.argv[2]
bias = biases[name]()
query, key, value = (torch.randn(1, heads, n, 64, dtype=torch.bfloat16) for _ in range(3))
with offline.compiling(card) as found:
    out = ab.attention(query, key, value, bias=bias, lowering="triton")
    if bias.requires_grad:
        torch.autograd.grad(out.float().sum(), [p for p in bias.parameters() if p.requires_grad])
rows = []
for made in found:
    inner = []
    if card.backend == "cuda" and made.tile is not None:
        code = offline.instructions(offline.code_of(made))
        ends = [(to, at) for at, _, to in code if to is not None and to < at]
        inner = [
            sum(op.startswith(("LDL", "STL")) for at, op, _ in code if a <= at <= b) * 16 / (b - a)
            for a, b in ends
            if not any(a <= c and d <= b and (c, d) != (a, b) for c, d in ends)
        ]
    rows.append({"kernel": made.kernel, "spilled": made.spilled, "inner": inner,
                 "fits": made.shared <= card.shared})
print("\\n" + json.dumps(rows))
"""


@pytest.mark.slow
@pytest.mark.parametrize("card", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("name", ["table", "sphere", "learned", "space and time"])
def test_kernels_of_distances_fit(name: str, card: str) -> None:
    """The forward kernels keep at most a few numbers of a thread in memory; of the instructions of
    inner loops less than three hundredths go there.
    """
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, card, name],
        cwd=root, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    wanted = {"forward"} if name == "table" else {"forward", "queries_pass"}
    assert wanted <= {row["kernel"] for row in rows}
    for row in rows:
        assert row["fits"], row
        assert max(row["inner"], default=0) < 0.03, row
        assert row["kernel"] != "forward" or row["spilled"] <= 16, row
