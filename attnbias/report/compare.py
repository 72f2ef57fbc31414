"""Two runs beside each other, in words: which heads differ beyond their intervals, and by what."""

from __future__ import annotations

import math
from dataclasses import dataclass

from attnbias.report.charts import number
from attnbias.report.data import Cell, Map, ReportData
from attnbias.report.summary import Summary


@dataclass(frozen=True)
class Difference:
    """One statistic of two runs. `strong`: some head's intervals do not meet."""

    key: str
    strong: bool
    statement: str
    largest: str
    controls: str
    head: tuple[str, int, int]


@dataclass(frozen=True)
class Comparison:
    """All differences, the strong ones first, and both verdicts."""

    verdict: str
    verdicts: tuple[str, str]
    differences: tuple[Difference, ...]


def compared(first: ReportData, second: ReportData, summaries: list[Summary]) -> Comparison:
    """The differences of the statistics that both runs hold, of the heads that both have.

    A head differs where its two 95% intervals do not meet; statistics without intervals are left to
    the maps.
    """
    found = []
    for one in first.maps:
        twin = second.map(one.statistic, one.tower) or second.map(one.statistic)
        if twin is not None and one.low and twin.low:
            made = _difference(one, twin)
            if made is not None:
                found.append(made)
    found.sort(key=lambda made: not made.strong)
    strong = sum(made.strong for made in found)
    verdict = (
        f"In {strong} of {len(found)} statistics at least one head differs beyond the intervals."
        if strong
        else "No head differs beyond the intervals in any statistic."
    )
    if not found:
        verdict = "The two runs share no head and statistic with intervals; see the maps."
    return Comparison(verdict, (summaries[0].verdict, summaries[1].verdict), tuple(found))


def _apart(a: Cell, b: Cell) -> bool:
    return a.low > b.high or b.low > a.high


def _difference(one: Map, twin: Map) -> Difference | None:
    theirs = {(cell.layer, cell.head): cell for cell in twin.cells()}
    pairs = [
        (cell, theirs[cell.layer, cell.head])
        for cell in one.cells()
        if (cell.layer, cell.head) in theirs and not math.isnan(cell.low)
    ]
    if not pairs:
        return None
    apart = [pair for pair in pairs if _apart(*pair)]
    a, b = max(apart or pairs, key=lambda pair: abs(pair[1].values - pair[0].values))
    unit = one.unit
    up = sum(y.values > x.values for x, y in apart)
    statement = f"{one.title}: {len(apart)} of {len(pairs)} heads differ beyond their intervals" + (
        f" ({up} higher in B, {len(apart) - up} lower)." if apart else "."
    )
    return Difference(
        key=one.statistic,
        strong=bool(apart),
        statement=statement,
        largest=f"The most: layer {a.layer}, head {a.head}, {_shown(a, unit)} in A, "
        f"{_shown(b, unit)} in B.",
        controls=f"The same head with words shuffled: {number(a.shuffled, unit)} in A, "
        f"{number(b.shuffled, unit)} in B; random weights: {number(a.random, unit)} and "
        f"{number(b.random, unit)}.",
        head=(one.tower, a.layer, a.head),
    )


def _shown(cell: Cell, unit: str) -> str:
    low, high = (number(end, unit) for end in (cell.low, cell.high))
    if not unit.startswith("share"):  # the unit stands with the value
        low, high = low.partition(" ")[0], high.partition(" ")[0]
    return f"{number(cell.values, unit)} (95% interval {low} to {high})"
