r"""Measured costs: the time of a lowering on a problem, from a table of seconds for what it does.

.. math:: t(\text{lowering}, \text{problem}) = \sum_c s_c\, n_c(\text{problem})

The counts :math:`n_c` are those of `attnbias.lowering.effort`; the seconds :math:`s_c \ge 0` were
fitted to measured problems, all lowerings together (`attnbias bench --calibrate`), the relative
errors as small as can be. Between the measured sizes this interpolates, and beyond them it grows as
the work does.

A table is of one kind of device. The package ships those of ``costs.json`` beside this file; a
table of your own machine comes first: the file that the variable ``ATTNBIAS_COSTS`` names, or else
``attnbias/costs.json`` in ``$XDG_CONFIG_HOME`` (``~/.config``). Where there is no table for a
device, without compiled loops, in a format that was not measured, or inside a graph that
`torch.compile` makes, the lowerings' own prices hold.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from attnbias import native
from attnbias.errors import AttnbiasError
from attnbias.lowering import effort, work
from attnbias.lowering.problem import Offer, Problem

SHIPPED = Path(__file__).with_name("costs.json")
VERSION = 1
KEPT = 4096  # choices of a table that are remembered
# Counts that name a structure.
MANY = (
    *("entries", "pull"),
    *(f"{who} {what}" for who in ("own", "triton", "flex") for what in ("reads", "sums")),
    *(f"{who} backward reads" for who in ("own", "triton", "flex")),
)


@dataclasses.dataclass(frozen=True)
class Table:
    """The costs of one kind of device.

    device: as `device_kind` names it. seconds: of each count. lowerings: those that were measured,
    with the directions and formats they were measured in. measured: on what, with what, when.
    chosen: what was found for problems that cost the same; a model asks the same again and again.
    """

    device: str
    seconds: Mapping[str, float]
    lowerings: Mapping[str, frozenset[str]]
    measured: str
    chosen: dict[tuple[object, ...], str] = dataclasses.field(default_factory=dict, compare=False)

    def measured_in(self, problem: Problem) -> frozenset[str]:
        """The lowerings that were measured in the direction and format of a problem."""
        if problem.empty:
            return frozenset()
        way = f"{effort.direction(problem)} {format_name(problem.query.dtype)}"
        names = [name for name, ways in self.lowerings.items() if way in ways]
        # A bias that learns by atomic additions differs from run to run, however fast it is.
        without = {"flex"} if problem.bias_gradient else set()
        return frozenset(names) & work.COUNTS.keys() - without

    def parts(self, lowering: str, problem: Problem) -> dict[str, float]:
        """Seconds of a lowering that offers on a problem, by count."""
        return self.times(work.counts(lowering, problem))

    def total(self, lowering: str, problem: Problem) -> float:
        """Seconds of a lowering that offers on a problem."""
        return sum(self.parts(lowering, problem).values())

    def serves(self, problem: Problem) -> bool:
        """Whether attention without a bias was measured in the direction and format of a
        problem.
        """
        way = "forward" if effort.direction(problem) == "forward" else "training"
        kind = f"{way} {format_name(problem.query.dtype)}"
        return not problem.empty and kind in self.lowerings.get("sdpa", ())

    def unbiased(self, problem: Problem) -> float:
        """Seconds of the same attention without its bias."""
        return sum(self.times(work.unbiased(problem)).values())

    def times(self, counts: effort.Counts) -> dict[str, float]:
        """Seconds of each count."""
        found = {}
        for name, count in counts.items():
            if count:
                each = self.seconds.get(name)
                found[name] = (self._like(name) if each is None else each) * count
        return found

    def _like(self, name: str) -> float:
        """What a structure that was not measured costs: the middle of those that were."""
        group = next((part for part in MANY if name.startswith(f"{part} ")), None)
        if group is None:
            return 0.0
        known = sorted(v for n, v in self.seconds.items() if n.startswith(f"{group} "))
        return known[len(known) // 2] if known else 0.0


def format_name(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def device_kind(device: torch.device) -> str:
    """The kind of device that a table is of: ``"cpu AVX512"``, ``"cuda NVIDIA H200"``. Tensors on
    the meta device are planned for as on the CPU.
    """
    if device.type in ("cpu", "meta"):
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    return device.type


_first: list[tuple[Table, ...]] = []  # tables that go before the others
_off = 0


@contextmanager
def using(path: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, the tables of this file come first."""
    _first.append(read(Path(path)))
    try:
        yield
    finally:
        _first.pop()


@contextmanager
def unmeasured() -> Iterator[None]:
    """Inside, only the lowerings' own prices hold."""
    global _off
    _off += 1
    try:
        yield
    finally:
        _off -= 1


def user_path() -> Path:
    """Where a table of this machine lies: ``$ATTNBIAS_COSTS``, or ``attnbias/costs.json`` in
    ``$XDG_CONFIG_HOME`` (``~/.config``).
    """
    named = os.environ.get("ATTNBIAS_COSTS")
    if named:
        return Path(named)
    folder = os.environ.get("XDG_CONFIG_HOME")
    return (Path(folder) if folder else Path.home() / ".config") / "attnbias" / "costs.json"


def table(device: torch.device) -> Table | None:
    """The costs that hold for a device now; None where none were measured."""
    # In a graph that is being compiled sizes are symbols: every count would tie it to one length.
    if torch.compiler.is_compiling():
        return None
    if _off or (device.type in ("cpu", "meta") and not native.available()):
        return None
    name = device_kind(device)
    for tables in (*reversed(_first), _installed()):
        for one in tables:
            if one.device == name:
                return one
    return None


@functools.cache
def _installed() -> tuple[Table, ...]:
    """The user's tables and the shipped ones, read once in a process."""
    path = user_path()
    if "ATTNBIAS_COSTS" in os.environ and not path.exists():
        raise AttnbiasError(f"ATTNBIAS_COSTS names the file {path}, which does not exist.")
    found = [*read(path)] if path.exists() else []
    if SHIPPED.exists():
        found += read(SHIPPED)
    return tuple(found)


def read(path: Path) -> tuple[Table, ...]:
    """The tables of a file.

    Raises:
        AttnbiasError: it cannot be read, or is no table of costs of this version.
    """
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AttnbiasError(f"the table of costs {path} cannot be read: {error}.") from error
    remake = "make a new one with `attnbias bench --calibrate`"
    if not isinstance(given, dict) or given.get("version") != VERSION:
        raise AttnbiasError(f"{path} is no table of costs of version {VERSION}; {remake}.")
    try:
        return tuple(_table(one) for one in given["tables"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AttnbiasError(f"the table of costs {path} is damaged ({error}); {remake}.") from error


def _table(given: Mapping[str, Any]) -> Table:
    seconds = {str(name): _number(value) for name, value in given["seconds"].items()}
    ways = {str(low): frozenset(map(str, found)) for low, found in given["lowerings"].items()}
    return Table(str(given["device"]), seconds, ways, str(given["measured"]))


def _number(value: Any) -> float:
    number = float(value)
    if not 0.0 <= number < math.inf:
        raise ValueError(f"{value!r} is no time")
    return number


def cheapest(problem: Problem, offers: Sequence[Offer]) -> Offer:
    """The first of `priced`, without what only an explanation needs."""
    known = table(problem.query.device)
    if known is None or not known.serves(problem):
        return min(offers, key=lambda offer: offer.time)
    names = known.measured_in(problem)
    measured = [offer for offer in offers if offer.lowering in names and not offer.refused]
    if not measured:
        return min(offers, key=lambda offer: offer.time)
    if len(measured) == 1:
        return measured[0]
    candidates = tuple(offer.lowering for offer in measured)
    key = (candidates, *effort.Effort.of(problem).key())
    best = known.chosen.get(key)
    if best is None:
        best = min(candidates, key=lambda name: known.total(name, problem))
        if len(known.chosen) >= KEPT:
            known.chosen.clear()
        known.chosen[key] = best
    return measured[candidates.index(best)]


def priced(problem: Problem, offers: Sequence[Offer]) -> list[Offer]:
    """The offers with measured times where there are such, the cheapest first, refusals last.

    An offer that was not measured keeps its own price and comes after those that were. The sort is
    stable: among equals the order given holds.
    """
    known = table(problem.query.device)
    floor = known.unbiased(problem) if known is not None and known.serves(problem) else 0.0
    if known is None or not floor:
        return sorted(offers, key=lambda offer: offer.time)
    found, names = [], known.measured_in(problem)
    for offer in offers:
        if offer.lowering in names and not offer.refused:
            total = known.total(offer.lowering, problem)
            offer = dataclasses.replace(offer, time=total / floor, seconds=total)
        found.append(offer)
    return sorted(found, key=lambda offer: (offer.refused, offer.seconds == 0.0, offer.time))
