"""The planner: asks every lowering, takes the cheapest exact offer, and can say why.

Times are those of the table of measured costs (`attnbias.lowering.costs`) where it knows the device
and the lowering, else the lowerings' own prices.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnbias.errors import AttnbiasError, Refused
from attnbias.lowering import costs
from attnbias.lowering.flex import Flex
from attnbias.lowering.fold import Fold
from attnbias.lowering.grid import Grid
from attnbias.lowering.own import Own
from attnbias.lowering.packed import Packed
from attnbias.lowering.problem import Lowering, Offer, Problem
from attnbias.lowering.reference import Reference
from attnbias.lowering.sdpa import Sdpa
from attnbias.lowering.stream import Stream
from attnbias.lowering.strided import Strided
from attnbias.lowering.tiled import Tiled
from attnbias.lowering.traffic import counted
from attnbias.lowering.triton import Triton
from attnbias.lowering.windows import Windows

LOWERINGS: dict[str, Lowering] = {
    low.name: low
    for low in (
        Sdpa(),
        Strided(),
        Windows(),
        Packed(),
        Grid(),
        Fold(),
        Tiled(),
        Stream(),
        Own(),
        Triton(),
        Flex(),
        Reference(),
    )
}


@dataclass(frozen=True)
class Explanation:
    """The offers and refusals for a problem, and the choice. ``str()`` is a table.

    Attributes:
        chosen: name of the lowering that would run.
        offers: one `Offer` per lowering, cheapest first, refusals last.
        problem: shapes, dtype and bias in words.
        source: where the times come from, in words.
        shares: of the chosen lowering's measured time, what each part of its work takes.
    """

    chosen: str
    offers: tuple[Offer, ...]
    problem: str
    source: str = ""
    shares: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        head = ["", "lowering", "time", "estimate", "extra memory", "error"]
        head += ["passes", "read", "written", "operations", "why"]
        rows = [head]
        for offer in self.offers:
            mark = "->" if offer.lowering == self.chosen else ""
            if offer.refused:
                rows.append([mark, offer.lowering, "refused", *[""] * 7, offer.reason])
            else:
                rows.append(
                    [
                        mark,
                        offer.lowering,
                        f"{offer.time:.2f} x",
                        time_text(offer.seconds) if offer.seconds else "",
                        size_text(offer.memory),
                        "exact" if offer.error == 0 else f"{offer.error:.1e}",
                        str(offer.passes or ""),
                        size_text(offer.read) if offer.passes else "",
                        size_text(offer.written) if offer.passes else "",
                        f"{offer.operations:.2e}" if offer.passes else "",
                        offer.reason,
                    ]
                )
        widths = [max(len(r[c]) for r in rows) for c in range(len(head))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        note = (
            "time: estimated, over the same attention without the bias "
            f"(causal: over causal attention); {self.source}\n"
            "passes: how often the scores are gone through; read, written: bytes that operators "
            "move, forward, no cache modelled"
        )
        if self.shares:
            parts = ", ".join(f"{name} {share:.0%}" for name, share in self.shares)
            note += f"\n{self.chosen} spends: {parts}"
        return "\n".join([self.problem, "", *lines, "", note])


def size_text(count: int) -> str:
    """Bytes for people."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    raise AssertionError


def time_text(seconds: float) -> str:
    """A time for people."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.0f} us"


def offers(problem: Problem) -> list[Offer]:
    """All answers, the cheapest first; among equals the order of `LOWERINGS` holds."""
    return costs.priced(problem, [low.answer(problem) for low in LOWERINGS.values()])


def explanation(problem: Problem, words: str) -> Explanation:
    """The offers with what they move and compute, the choice, and what its time is made of."""
    found = offers(problem)
    chosen = found[0]
    source = "these are the lowerings' own prices"
    shares: list[tuple[str, float]] = []
    known = costs.table(problem.query.device)
    if known is not None and chosen.seconds:
        source = f"measured: {known.measured}"
        parts = known.parts(chosen.lowering, problem)
        shares = sorted(((n, s / chosen.seconds) for n, s in parts.items()), key=lambda x: -x[1])
    counts = tuple(counted(offer, problem) for offer in found)
    kept = tuple((name, share) for name, share in shares if share >= 0.02)
    return Explanation(chosen.lowering, counts, words, source, kept)


def choose(problem: Problem, name: str | None = None) -> Lowering:
    """The lowering that runs: the cheapest offer, or the one asked for by name."""
    if name is None:
        answers = [low.answer(problem) for low in LOWERINGS.values()]
        return LOWERINGS[costs.cheapest(problem, answers).lowering]
    if name not in LOWERINGS:
        known = ", ".join(LOWERINGS)
        raise AttnbiasError(f"lowering must be one of {known}, got {name!r}.")
    offer = LOWERINGS[name].answer(problem)
    if offer.refused:
        raise Refused(f"lowering {name!r} refuses this problem: {offer.reason}.")
    return LOWERINGS[name]
