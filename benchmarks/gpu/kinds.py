"""The structures of the suite: drawn, built with the library, and written out without it."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

import attnbias as ab
from benchmarks.gpu.case import Case, Kind, Parameters, Picked, Score
from benchmarks.structure_problem import BUCKETS, t5_bucket

PENGUIN_PERIODS = (24, 168)


def _steps(case: Case, picked: Picked) -> Tensor:
    """``j - i`` of the sampled rows, counted from the end where there are fewer queries."""
    keys = torch.arange(case.m, device=case.device)
    return keys - picked.rows[:, None] - (case.m - case.queries)


def _strip_rows(case: Case, strip: Tensor, picked: Picked) -> Tensor:
    """Rows of the diagonals ``strip[h, j - i + queries - 1]`` (as many queries as keys)."""
    index = torch.arange(case.m, device=case.device) - picked.rows[:, None] + case.queries - 1
    return strip[:, index][None]


def _strip_score(case: Case, strip: Tensor) -> Score:
    start = case.queries - 1
    return lambda s, b, h, i, j: s + strip[h, j - i + start]


# A number for each key ---------------------------------------------------------------------------

KEY = Kind(
    "key bias",
    lambda case: {"weight": case.normal("weight", case.heads, case.m)},
    lambda case, given: ab.KeyBias(given["weight"]),
    lambda case, given, picked: given["weight"][None, :, None],
    lambda case, given: lambda s, b, h, i, j: s + given["weight"][h, j],
    learned=("weight",),
)

# Factors -----------------------------------------------------------------------------------------


def _factors(case: Case, rank: int) -> dict[str, Tensor]:
    # Entries u . v of variance one.
    u = case.normal("u", case.heads, case.queries, rank) * rank**-0.25
    return {"u": u, "v": case.normal("v", case.heads, case.m, rank) * rank**-0.25}


def _factor_rows(case: Case, given: Parameters, picked: Picked) -> Tensor:
    return (given["u"][:, picked.rows] @ given["v"].mT)[None]


def _factor_score(case: Case, given: Parameters) -> Score:
    u, v = given["u"], given["v"]

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        for r in range(u.shape[-1]):  # FlexAttention takes no sums over a dimension
            s = s + u[h, i, r] * v[h, j, r]
        return s

    return score


def low_rank(rank: int) -> Kind:
    """Learned factors N(0, 1), scaled so that entries have variance one."""
    return Kind(
        f"low rank {rank}",
        partial(_factors, rank=rank),
        lambda case, given: ab.LowRank(given["u"], given["v"]),
        _factor_rows,
        _factor_score,
        learned=("u", "v"),
        columns=rank,
        stored=rank,
        ops=0,
    )


# Diagonals ---------------------------------------------------------------------------------------


def _slopes(case: Case) -> dict[str, Tensor]:
    heads = torch.arange(1, case.heads + 1, device=case.device)
    return {"slopes": 2.0 ** (-8.0 * heads / case.heads)}


def _alibi(case: Case, given: Parameters) -> ab.Bias:
    form = ab.forms.ALiBi(heads=case.heads, slopes=given["slopes"])
    bias: ab.Bias = form(queries=case.queries, keys=case.m)
    return bias


ALIBI = Kind(
    "ALiBi",
    _slopes,
    _alibi,
    lambda case, given, picked: -given["slopes"][None, :, None, None] * _steps(case, picked).abs(),
    lambda case, given: lambda s, b, h, i, j: s - given["slopes"][h] * (i - j).abs(),
)


def _t5_strip(case: Case, given: Parameters) -> Tensor:
    index = t5_bucket(case.steps(), both=not case.causal)
    return given["table"].index_select(0, index).T


def _t5(case: Case, given: Parameters) -> ab.Bias:
    form = ab.forms.T5(
        heads=case.heads,
        buckets=BUCKETS,
        bidirectional=not case.causal,
        table=given["table"],
    )
    bias: ab.Bias = form(queries=case.queries, keys=case.m)
    return bias


T5 = Kind(
    "T5 buckets",
    lambda case: {"table": case.normal("table", BUCKETS, case.heads)},
    _t5,
    lambda case, given, picked: _strip_rows(case, _t5_strip(case, given), picked),
    lambda case, given: _strip_score(case, _t5_strip(case, given)),
    learned=("table",),
)


def _penguin_strip(case: Case, given: Parameters) -> Tensor:
    away = case.steps().abs().double()
    waves = [torch.minimum(away % t, t - away % t) for t in PENGUIN_PERIODS] + [away]
    slopes = given["slopes"]
    each = [-slopes[:, None] * wave.to(slopes.dtype) for wave in waves]
    return torch.cat(each)


def _penguin_slopes(case: Case) -> dict[str, Tensor]:
    count = case.heads // (len(PENGUIN_PERIODS) + 1)
    heads = torch.arange(1, count + 1, device=case.device)
    return {"slopes": 2.0 ** (-8.0 * heads / count)}


def _penguin(case: Case, given: Parameters) -> ab.Bias:
    form = ab.forms.PENGUIN(case.heads, PENGUIN_PERIODS, slopes=given["slopes"])
    bias: ab.Bias = form(case.queries)
    return bias


PENGUIN = Kind(
    "PENGUIN",
    _penguin_slopes,
    _penguin,
    lambda case, given, picked: _strip_rows(case, _penguin_strip(case, given), picked),
    lambda case, given: _strip_score(case, _penguin_strip(case, given)),
)

# Windows of a grid -------------------------------------------------------------------------------


def _window_draw(case: Case) -> dict[str, Tensor]:
    side = case.more["window"]
    found = {"table": case.normal("table", case.heads, 2 * side - 1, 2 * side - 1)}
    return found | ({"ids": _regions(case)} if case.more.get("shift") else {})


def _regions(case: Case) -> Tensor:
    """``(windows, tokens)``: numbers of the regions that a roll by half a window brings together;
    the windows of one image, row by row.
    """
    side, shift, whole = case.more["window"], case.more["shift"], case.more["grid"]
    at = torch.arange(whole, device=case.device)
    line = (at >= whole - side).long() + (at >= whole - shift).long()
    ids = (3 * line[:, None] + line).view(whole // side, side, whole // side, side)
    images = case.batch // (whole // side) ** 2
    found: Tensor = ids.transpose(1, 2).reshape(-1, side * side).repeat(images, 1)
    return found


def _window_make(case: Case, given: Parameters) -> ab.Bias:
    side = case.more["window"]
    bias: ab.Bias = ab.GridRelative(given["table"], (side, side))
    return bias + ab.Segments(given["ids"], given["ids"]) if "ids" in given else bias


def _window_rows(case: Case, given: Parameters, picked: Picked) -> Tensor:
    side = case.more["window"]
    keys = torch.arange(case.m, device=case.device)
    rows = picked.rows[:, None]
    down, across = keys // side - rows // side, keys % side - rows % side
    entries = given["table"][:, down + side - 1, across + side - 1][None]
    if "ids" not in given:
        return entries
    ids = given["ids"][picked.batches]
    hidden = ids[:, picked.rows][:, :, None] != ids[:, None]
    return entries.masked_fill(hidden[:, None], -math.inf)


def _window_score(case: Case, given: Parameters) -> Score:
    side, table, ids = case.more["window"], given["table"], given.get("ids")

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        down, across = j // side - i // side + side - 1, j % side - i % side + side - 1
        s = s + table[h, down, across]
        return s if ids is None else torch.where(ids[b, i] == ids[b, j], s, -math.inf)

    return score


SWIN = Kind(
    "window table", _window_draw, _window_make, _window_rows, _window_score,
    learned=("table",), ops=3,
)  # fmt: skip

# A matrix for all rows of the batch --------------------------------------------------------------

PAIR = Kind(
    "pair bias",
    lambda case: {"pair": case.normal("pair", 1, case.heads, case.queries, case.m)},
    lambda case, given: ab.Dense(given["pair"]),
    lambda case, given, picked: given["pair"][:, :, picked.rows],
    lambda case, given: lambda s, b, h, i, j: s + given["pair"][0, h, i, j],
    learned=("pair",),
)
