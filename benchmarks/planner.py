"""The planner on 200 problems that its table of costs never saw: what its choices lose.

    python -m benchmarks.planner [--quick] [--minutes M] [--fresh]

Problems are drawn by the seed below: one structure, a sum that models use, or a sum of two drawn at
random; forward, training, or with gradients to the bias; float32, bfloat16 and float16; with and
without causal mask, grouped heads, dropout; self and cross attention and decoding. Every lowering
that offers runs each of them, in turns (the float64 oracle and interpreted kernels do not compete).
The regret of a choice is its median time over that of the fastest lowering: 1.00 chose best.

Beside the planner's regret stands that of the lowerings' own prices, without the table, and of
taking `own` wherever it offers; and the planner's own time, which is part of every call. Problems
are written as they finish and a rerun continues where the code and the table are the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from attnbias.cli import calibration
from attnbias.cli.problems import DIRECTIONS, FIXED, ON_A_GRID, STRUCTURES, SUMS, Case, draw
from attnbias.lowering import choose, costs, offers
from attnbias.lowering.planner import time_text
from benchmarks import common

MODULE = "benchmarks.planner"
SEED = 200_120
COUNT, QUICK = 200, 4
GOALS = {"median": 1.05, "worst": 1.5}
POLICIES = ("planner", "own prices", "own first")


def cases(count: int = COUNT) -> list[Case]:
    """The problems; none is among those of the calibration."""
    source = random.Random(SEED)
    loose = [name for name in STRUCTURES if name not in (*ON_A_GRID, "shaw")]
    formats = ("float32",) * 6 + ("bfloat16",) * 2 + ("float16",)
    known = {dataclasses.replace(case, seed=0) for case in calibration.cases()}
    found: list[Case] = []
    while len(found) < count:
        way = source.random()
        structures: tuple[str, ...] = (source.choice(list(STRUCTURES)),)
        if way < 0.2:
            structures = source.choice(SUMS)
        elif way < 0.4:
            structures = tuple(source.sample(loose, 2))
        direction, dtype = source.choice(DIRECTIONS), source.choice(formats)
        if direction == "learned" and set(structures) <= set(FIXED):
            direction = "training"
        dropout = 0.1 if source.random() < 0.08 else 0.0
        case = draw(source, structures, direction, dtype, dropout=dropout, most=3e9)
        if dataclasses.replace(case, seed=0) not in known:
            found.append(case)
    return found


def measured(case: Case, budget: float) -> dict[str, Any]:
    """One problem: the choices, the planner's time, and the time of every lowering."""
    device = torch.device("cpu")
    query, key, value, bias = case.build(device)
    taken = calibration.turns(calibration.calls(case, query, key, value, bias), device, budget)
    problem = calibration.problem_of(case)
    made = offers(problem)
    planning = []
    for _ in range(9):
        fresh = dataclasses.replace(problem)  # without what earlier offers found out
        start = time.perf_counter()
        choose(fresh)
        planning.append(time.perf_counter() - start)
    with costs.unmeasured():
        by_price = offers(dataclasses.replace(problem))
    choices = {
        "planner": made[0].lowering,
        "own prices": by_price[0].lowering,
        "own first": "own" if "own" in taken else made[0].lowering,
    }
    fastest = min(taken.values())
    return {
        "case": dataclasses.asdict(case),
        "seconds": {name: float(f"{t:.4g}") for name, t in taken.items()},
        "expected": {o.lowering: float(f"{o.seconds:.4g}") for o in made if o.lowering in taken},
        "choices": choices,
        "regret": {name: round(taken[low] / fastest, 4) for name, low in choices.items()},
        "planning": float(f"{statistics.median(planning):.4g}"),
    }


def summary(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Quantiles of the regret of each policy, over problems where there is a choice to make."""
    open_ = [one for one in found if len(one["seconds"]) > 1]
    told: dict[str, Any] = {"problems": len(found), "with a choice": len(open_)}
    for policy in POLICIES:
        values = sorted(one["regret"][policy] for one in open_)
        if values:
            told[policy] = {
                "median": statistics.median(values),
                "mean": round(statistics.fmean(values), 4),
                "90 %": values[int(0.9 * (len(values) - 1))],
                "worst": values[-1],
                "fastest": round(sum(v == 1.0 for v in values) / len(values), 3),
            }
    shares = [one["planning"] / one["seconds"][one["choices"]["planner"]] for one in found]
    if shares:
        told["planning"] = {
            "median s": statistics.median(one["planning"] for one in found),
            "share of the call, median": round(statistics.median(shares), 4),
            "share of the call, worst": round(max(shares), 3),
        }
    if open_:
        told["holds"] = {k: told["planner"][k] <= limit for k, limit in GOALS.items()}
    return told


def report(payload: Mapping[str, Any]) -> str:
    """The Markdown beside the JSON."""
    told, found = payload["summary"], payload["problems"]
    parts = ["# The planner's choices on problems it never saw", common.header_markdown(payload)]
    state = "" if payload["complete"] else " The run is not whole yet."
    parts.append(
        f"{told['problems']} problems, {told['with a choice']} with more than one lowering that "
        f"offers; table of costs: {payload['table']}.{state}"
    )
    if "planner" in told:
        rows = [[name, *(f"{told[name][k]:.2f}" for k in ("median", "mean", "90 %", "worst")),
                 f"{told[name]['fastest']:.0%}"] for name in POLICIES]  # fmt: skip
        head = ["regret of", "median", "mean", "90 %", "worst", "chose the fastest"]
        parts.append(common.markdown_table(head, rows))
        verdicts = [
            f"{name} at most {limit}: {'holds' if told['holds'][name] else 'FALLS SHORT'} "
            f"({told['planner'][name]:.3f})"
            for name, limit in GOALS.items()
        ]
        parts.append("Goals: " + "; ".join(verdicts) + ".")
        cost = told["planning"]
        parts.append(
            "Asking all lowerings and choosing, for sizes that were met before, takes "
            f"{time_text(cost['median s'])} (median), "
            f"{cost['share of the call, median']:.1%} of the call it chooses (median), "
            f"{cost['share of the call, worst']:.0%} at most. It is not in the regret."
        )
        chosen = Counter(one["choices"]["planner"] for one in found)
        best = Counter(min(one["seconds"], key=one["seconds"].get) for one in found)
        names = sorted({*chosen, *best}, key=lambda name: -best[name])
        rows = [[name, str(best[name]), str(chosen[name])] for name in names]
        parts.append(common.markdown_table(["lowering", "was fastest", "was chosen"], rows))
        worst = sorted(found, key=lambda one: -one["regret"]["planner"])[:15]
        parts += ["## The largest regrets", common.markdown_table(_HEAD, map(_row, worst))]
    return "\n\n".join(parts) + "\n"


_HEAD = ("problem", "regret", "chosen", "measured (expected) ms")


def _row(one: Mapping[str, Any]) -> list[str]:
    case = Case.of(one["case"])
    words = [" + ".join(case.structures), case.direction, case.dtype]
    words.append(f"{case.batch} x {case.heads}/{case.key_heads} heads of {case.size}")
    words.append(f"{case.queries} x {case.keys}" + (", causal" if case.causal else ""))
    words += [f"dropout {case.dropout}"] * (case.dropout > 0)
    times = [
        f"{name} {1e3 * taken:.3g} ({1e3 * one['expected'].get(name, 0.0):.3g})"
        for name, taken in sorted(one["seconds"].items(), key=lambda item: item[1])
    ]
    regret = f"{one['regret']['planner']:.2f}"
    return [", ".join(words), regret, one["choices"]["planner"], ", ".join(times)]


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    made = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.split("\n")[0])
    made.add_argument("--quick", action="store_true", help="a few problems, written to out/")
    made.add_argument("--count", type=int, help="only the first so many problems, to out/")
    made.add_argument("--minutes", type=float, default=9.0, help="for all problems, default: 9")
    made.add_argument("--fresh", action="store_true", help="measure all of them again")
    args = made.parse_args(given)
    box = common.machine(torch.get_num_threads())
    whole = cases()
    todo = whole[: QUICK if args.quick else args.count or COUNT]
    path = common.recorded_or_scratch("planner.json", box)
    if len(todo) < COUNT:
        path = common.SCRATCH / "quick_planner.json"
    known = costs.table(torch.device("cpu"))
    state = {
        "code": common.fingerprint("attnbias/lowering", "attnbias/native", "attnbias/bias"),
        "table": "none" if known is None else known.measured,
    }
    before = {} if args.fresh else common.load_grid(path)
    kept = before.get("problems", []) if all(before.get(k) == v for k, v in state.items()) else []
    done = {tuple(sorted(_flat(one["case"]).items())): one for one in kept}
    started, begin = common.now(), time.perf_counter()
    found: list[dict[str, Any]] = []
    late = False
    with common.progress("planner", float(len(todo))) as advance:
        for at, case in enumerate(todo):
            one = done.get(tuple(sorted(_flat(dataclasses.asdict(case)).items())))
            left = 60.0 * args.minutes - (time.perf_counter() - begin)
            if one is None and left <= 0:
                late = True
                continue
            found.append(one or measured(case, left / (len(todo) - at)))
            advance(1.0, " + ".join(case.structures))
            if one is None and (at % 10 == 9 or at + 1 == len(todo)):
                _write(path, given, started, begin, found, len(todo), state)
    _write(path, given, started, begin, found, len(todo), state)
    told = summary(found)
    print(f"{path}: {told}")
    if late:
        print(f"{len(todo) - len(found)} problems are left: run it again", file=sys.stderr)
    return 0


def _flat(case: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in case.items()}


def _write(
    path: Any,
    given: Sequence[str],
    started: str,
    begin: float,
    found: Sequence[Mapping[str, Any]],
    whole: int,
    state: Mapping[str, str],
) -> None:
    head = common.header(
        MODULE,
        given,
        seeds={"problems": SEED, "calibration": calibration.SEED},
        started=started,
        seconds=time.perf_counter() - begin,
        threads=torch.get_num_threads(),
    )
    payload = {
        **head,
        **state,
        "complete": len(found) == whole,
        "goals": GOALS,
        "summary": summary(found),
        "problems": list(found),
    }
    common.write_result(path, payload, report(payload))


if __name__ == "__main__":
    sys.exit(main())
