"""The structures of the suite that are functions of a distance."""

from __future__ import annotations

import torch
from torch import Tensor

import attnbias as ab
from benchmarks.gpu.case import Case, Kind, Parameters, Picked, Score

SPACE, TIME = 5, 3  # terms of the networks of radial basis functions


def _network(case: Case, name: str, terms: int, widest: float = 1.0) -> dict[str, Tensor]:
    """Weights N(0, 1); rates such that terms reach as far as 0.7 to `widest`, evenly in logs."""
    reach = 0.7 * (widest / 0.7) ** case.uniform(f"{name} reach", case.heads, terms)
    return {f"{name}_a": case.normal(f"{name} a", case.heads, terms), f"{name}_b": reach**-2}


def _rbf(given: Parameters, name: str, square: Tensor) -> Tensor:
    """``sum_f a_hf exp(-b_hf d^2)`` of squares ``(batch | 1, rows, keys)``, a term at a time."""
    a, b = given[f"{name}_a"], given[f"{name}_b"]
    total = torch.zeros((), dtype=square.dtype, device=square.device)
    for f in range(a.shape[1]):
        weight, rate = (p[None, :, f, None, None] for p in (a, b))
        total = total + weight * torch.exp(-rate * square[:, None])
    return total


def _add_rbf(s: Tensor, a: Tensor, b: Tensor, h: Tensor, square: Tensor) -> Tensor:
    for f in range(a.shape[1]):
        s = s + a[h, f] * torch.exp(-b[h, f] * square)
    return s


# Space and time, points of their own in each element of the batch --------------------------------


def _scan_draw(case: Case) -> dict[str, Tensor]:
    points = {
        "place": 4 * case.uniform("place", case.batch, case.queries, 2) - 2,
        "time": case.uniform("time", case.batch, case.queries),
    }
    return points | _network(case, "space", SPACE) | _network(case, "when", TIME)


def _scan(case: Case, given: Parameters) -> ab.Bias:
    form = ab.forms.BSA(
        "rbf",
        case.heads,
        space=[given["space_a"], given["space_b"]],
        time=[given["when_a"], given["when_b"]],
    )
    x, t = given["place"], given["time"][..., None]
    return form(x, x, x_time=t, y_time=t)


def _scan_rows(case: Case, given: Parameters, picked: Picked) -> Tensor:
    x, t = (given[name][picked.batches] for name in ("place", "time"))
    space = (x[:, picked.rows, None] - x[:, None]).square().sum(-1)
    when = (t[:, picked.rows, None] - t[:, None]).square()
    return _rbf(given, "space", space) + _rbf(given, "when", when)


def _scan_score(case: Case, given: Parameters) -> Score:
    x, t = given["place"], given["time"]

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        across, down = (x[b, i, dim] - x[b, j, dim] for dim in (0, 1))
        later = t[b, i] - t[b, j]
        s = _add_rbf(s, given["space_a"], given["space_b"], h, across * across + down * down)
        return _add_rbf(s, given["when_a"], given["when_b"], h, later * later)

    return score


SCAN = Kind(
    "RBF, space and time",
    _scan_draw,
    _scan,
    _scan_rows,
    _scan_score,
    learned=("space_a", "space_b", "when_a", "when_b"),
    stored=3,
    exps=SPACE + TIME,
    ops=8 + 2 * (SPACE + TIME),
)

# One field of test points on context points ------------------------------------------------------

REACH = 32.0


def _field_draw(case: Case) -> dict[str, Tensor]:
    """Test points on a square grid over ``[-32, 32]^2``, context anywhere in it."""
    side = max(int(case.queries**0.5), 2)
    index = torch.arange(case.queries, device=case.device)
    grid = torch.stack([index // side, index % side], -1) * (2 * REACH / (side - 1)) - REACH
    found = {"test": grid.float()}
    if not case.more.get("itself"):
        found["context"] = REACH * (2 * case.uniform("context", case.m, 2) - 1)
    # Some terms reach over the whole field: short ones alone would hardly move an output.
    return found | _network(case, "space", SPACE, REACH)


def _field(case: Case, given: Parameters) -> ab.Bias:
    radial = ab.radial.RBF(given["space_a"], given["space_b"])
    return ab.Distance(given["test"], given.get("context", given["test"]), radial)


def _field_rows(case: Case, given: Parameters, picked: Picked) -> Tensor:
    y = given.get("context", given["test"])
    square = (given["test"][picked.rows, None] - y).square().sum(-1)
    return _rbf(given, "space", square[None])


def _field_score(case: Case, given: Parameters) -> Score:
    x, y = given["test"], given.get("context", given["test"])

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        across, down = (x[i, dim] - y[j, dim] for dim in (0, 1))
        return _add_rbf(s, given["space_a"], given["space_b"], h, across * across + down * down)

    return score


FIELD = Kind(
    f"RBF {SPACE}", _field_draw, _field, _field_rows, _field_score,
    learned=("space_a", "space_b"), stored=2, exps=SPACE, ops=5 + 2 * SPACE,
)  # fmt: skip

# Squared distance with a weight for each query ---------------------------------------------------


def _solver_draw(case: Case) -> dict[str, Tensor]:
    return {
        "place": case.uniform("place", case.queries, 3),
        "weight": 0.5 + 4 * case.uniform("weight", case.heads, case.queries),
    }


def _solver_rows(case: Case, given: Parameters, picked: Picked) -> Tensor:
    x = given["place"]
    square = (x[picked.rows, None] - x).square().sum(-1)
    return -given["weight"][None, :, picked.rows, None] * square


def _solver_score(case: Case, given: Parameters) -> Score:
    x, weight = given["place"], given["weight"]

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        square = (x[i, 0] - x[j, 0]) * (x[i, 0] - x[j, 0])
        for dim in (1, 2):
            step = x[i, dim] - x[j, dim]
            square = square + step * step
        return s - weight[h, i] * square

    return score


SOLVER = Kind(
    "squared distance, weighted",
    _solver_draw,
    lambda case, given: ab.forms.NeuralSolver()(given["place"], given["place"], given["weight"]),
    _solver_rows,
    _solver_score,
    learned=("weight",),
    stored=4,
    ops=7,
)
