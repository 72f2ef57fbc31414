"""(j) Seeing attention at 32,768 tokens: received mass, entropy, shares of groups, largest weights.

    python -m benchmarks.gpu.seen [--rehearse] [--minutes M]

8 heads of 64, one sequence, bfloat16; causal and not, without a bias and with T5's buckets. All
four statistics are found in one pass after the log-sum-exp; "ours" is the forward and that pass,
over unbiased flash attention of the same run. All is compared with float64 over all rows.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnbias.bias import Bias, Causal
from benchmarks.gpu.case import Case
from benchmarks.gpu.device import turns
from benchmarks.gpu.group import Context, Goal, Group, over_flash
from benchmarks.gpu.kinds import T5
from benchmarks.gpu.lines import FLOOR, OURS, failure, fatal, floor_backend
from benchmarks.gpu.lines import _restricted as restricted
from benchmarks.gpu.measure import Lost, ratios, short
from benchmarks.gpu.truth import gap

SCRIPT = "seen"
TOKENS, HEADS, SIZE = 32_768, 8, 64
PARTS, TOP, FEW = 4, 4, 2**26  # groups of keys, largest weights, scores of a block of the truth
FORWARD, PASS, RECEIVED = "ours, forward alone", "ours, the pass alone", "ours, received alone"
GOALS = (Goal("four statistics and the forward", 2.0, over_flash("forward"), lambda case: True),)


def case(length: int, causal: bool, biased: bool, device: str) -> Case:
    label = f"{'causal' if causal else 'full'}, {'biased' if biased else 'no bias'}"
    return Case(
        SCRIPT, T5, device, 1, HEADS, length, SIZE, causal=causal, training=False, label=label
    )


def groups(rehearse: bool = False) -> list[Group]:
    length = 40 if rehearse else TOKENS
    found = []
    for causal in (False, True):
        for biased in (False, True):
            here = case(length, causal, biased, "cpu")
            run = partial(measure, length, causal, biased)
            tier = 1 if causal and not biased else 2
            found.append(Group(SCRIPT, here.name, run, tier, float(here.pairs), here.describe()))
    return found


def added(here: Case, table: Tensor | None) -> Bias | None:
    """All that is added to the scores: what the problem has, as `attention` puts it together."""
    parts: list[Bias] = [] if table is None else [T5.make(here, {"table": table})]
    if here.causal:
        parts.append(Causal(queries=here.queries, keys=here.m))
    return sum(parts[1:], parts[0]) if parts else None


def truth(here: Case, q: Tensor, k: Tensor, table: Tensor | None, ids: Tensor) -> dict[str, Tensor]:
    """The four statistics in float64, a block of rows at a time."""
    n, m = here.queries, here.m
    found = {"received": torch.zeros(1, HEADS, m, dtype=torch.float64, device=q.device)}
    lines: dict[str, list[Tensor]] = {"entropy": [], "shares": [], "top": []}
    one_hot = torch.nn.functional.one_hot(ids, PARTS).double()
    strip = None
    if table is not None:
        strip = T5.make(here, {"table": table.double()}).table[0]  # type: ignore[attr-defined]
    keys = torch.arange(m, device=q.device)
    for part in torch.split(torch.arange(n, device=q.device), max(FEW // (HEADS * m), 1)):
        scores = q[:, :, part].double() @ k.double().mT * here.size**-0.5
        if strip is not None:
            scores += strip[:, keys - part[:, None] + n - 1]
        if here.causal:
            scores.masked_fill_(keys > part[:, None], -math.inf)
        logs = scores.log_softmax(-1)
        weight = logs.exp()
        found["received"] += weight.sum(2)
        lines["entropy"].append(-(weight * logs.clamp(min=-1e30)).sum(-1))
        lines["shares"].append(weight @ one_hot)
        lines["top"].append(weight.topk(min(TOP, m), -1).values)
    return found | {name: torch.cat(parts, 2) for name, parts in lines.items()}


def measure(length: int, causal: bool, biased: bool, context: Context) -> dict[str, Any]:
    from attnbias.kernels import launch, statistics_pass
    from attnbias.lowering import triton_parts
    from attnbias.lowering.problem import Problem

    begin, device = time.perf_counter(), context.device
    here = case(length, causal, biased, device.name)
    q, k, v, _ = here.inputs()
    parameters = T5.draw(here) if biased else {}
    bias = added(here, parameters.get("table"))
    problem = Problem(q, k, v, bias, here.size**-0.5)
    ids = here.integers("groups", PARTS, here.m)
    features = torch.nn.functional.one_hot(ids, PARTS).float()[None]
    asked = {
        RECEIVED: statistics_pass.Wanted(),
        PASS: statistics_pass.Wanted(inner=True, top=min(TOP, here.m), features=features),
    }
    attend = restricted(floor_backend(here), here, device)

    def forward() -> tuple[Tensor, Tensor]:
        given = triton_parts.give(problem, bias)
        found: tuple[Tensor, Tensor] = launch.forward_pass(q, k, v, problem.scale, given)
        return found

    def seeing(name: str, lse: Tensor) -> Any:
        given = triton_parts.give(problem, bias)
        return statistics_pass.statistics_pass(q, k, lse, problem.scale, given, asked[name])

    def both() -> Any:
        return seeing(PASS, forward()[1])

    cells: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Any]] = {FLOOR: lambda: attend(q, k, v), FORWARD: forward}
    with torch.no_grad():
        try:
            context.say(OURS)
            lse = forward()[1]
            calls |= {name: partial(seeing, name, lse) for name in asked} | {OURS: both}
            cells[OURS] = checked(here, both, truth(here, q, k, parameters.get("table"), ids))
        except Exception as error:
            if fatal(error):
                raise Lost(OURS, error) from error
            cells[OURS] = failure(error)
            calls.pop(FORWARD, None)

        def on_error(name: str, error: Exception) -> None:
            cells[name] = failure(error)

        for name, call in calls.items():
            cells.setdefault(name, {"status": "ok"})
            if cells[name]["status"] == "ok":
                context.say(name)
                cells[name]["memory_forward"] = device.peak(call)
        found = turns(
            device, {name: (None, lambda _, call=call: call()) for name, call in calls.items()},  # type: ignore[misc]
            budget=context.budget, on_error=on_error,
        )  # fmt: skip
    for name, timing in found.items():
        cells[name]["forward"] = {
            "median_s": short(timing.median),
            "low_s": short(timing.low),
            "high_s": short(timing.high),
            "rounds": len(timing.samples),
        }
        if FLOOR in found:
            cells[name]["ratio"] = ratios({"forward": timing}, {"forward": found[FLOOR]})
    return {
        "status": "ok",
        "case": here.describe(),
        "lines": cells,
        "seconds": round(time.perf_counter() - begin, 1),
    }


def checked(here: Case, both: Callable[[], Any], want: dict[str, Tensor]) -> dict[str, Any]:
    """Errors against float64, and whether two runs have the same bits."""
    runs = []
    for _ in range(2):
        found = both()
        runs.append(
            {
                "received": found.received,
                "entropy": found.inner,
                "shares": found.means,
                "top": found.weight,
            }
        )
    one, two = runs
    return {
        "status": "ok",
        "error": {name: gap(tensor, want[name]) for name, tensor in one.items()},
        "repeats": {name: torch.equal(tensor, two[name]) for name, tensor in one.items()},
    }


if __name__ == "__main__":
    from benchmarks.gpu.__main__ import main

    sys.exit(main(["--only", SCRIPT, *sys.argv[1:]]))
