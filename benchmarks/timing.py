"""Interleaved timing: lines take turns, so that a drift of the machine hits all of them."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Clock = Callable[[], float]


@dataclass(frozen=True)
class Timing:
    """The durations of one line, in seconds, in the order of the rounds."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median duration in seconds."""
        return statistics.median(self.samples)

    @property
    def low(self) -> float:
        """The shortest duration in seconds."""
        return min(self.samples)

    @property
    def high(self) -> float:
        """The longest duration in seconds."""
        return max(self.samples)

    def over(self, floor: Timing) -> dict[str, float]:
        """The ratio to another line of the same rounds.

        `ratio` is the median over the floor's median; `ratio_low`, `ratio_high` are the quartiles
        of the ratios of single rounds (both calls of one round ran next to each other).
        """
        pairs = sorted(a / b for a, b in zip(self.samples, floor.samples, strict=True))
        low, high = pairs[0], pairs[-1]
        if len(pairs) >= 5:
            low, _, high = statistics.quantiles(pairs, n=4, method="inclusive")
        return {"ratio": self.median / floor.median, "ratio_low": low, "ratio_high": high}

    def record(self, digits: int = 6) -> dict[str, Any]:
        """What goes into a result file."""
        return {
            "median_s": round(self.median, digits),
            "low_s": round(self.low, digits),
            "high_s": round(self.high, digits),
            "samples_s": [round(sample, digits) for sample in self.samples],
        }


def rounds_for(round_seconds: float, *, budget: float, least: int = 3, most: int = 40) -> int:
    """How many rounds fit the budget (seconds), between `least` and `most`."""
    if round_seconds <= 0:
        return most
    return max(least, min(most, int(budget / round_seconds)))


def interleave(
    lines: Mapping[str, Callable[[], Any]],
    *,
    budget: float = 10.0,
    least: int = 3,
    most: int = 40,
    warmups: int = 1,
    inspect: Callable[[str, Any], None] | None = None,
    on_error: Callable[[str, Exception], None] | None = None,
    clock: Clock = time.perf_counter,
) -> dict[str, Timing]:
    """Time every line once per round, in turns; the order is rotated by one from round to round.

    The first timed round decides how many follow (`rounds_for`). `warmups` rounds before it are
    thrown away. `inspect(name, result)` sees each line's first result, outside the timed region.
    A line that raises is told to `on_error` and left out from there on; without `on_error` the
    whole comparison stops.
    """
    if not lines:
        return {}
    alive = dict(lines)
    seen: set[str] = set()
    samples: dict[str, list[float]] = {name: [] for name in lines}

    def one_round(index: int, keep: bool) -> float:
        spent = 0.0
        names = list(alive)
        turn = index % max(len(names), 1)
        for name in names[turn:] + names[:turn]:
            start = clock()
            try:
                result = alive[name]()
            except Exception as error:
                if on_error is None:
                    raise
                del alive[name]
                on_error(name, error)
                continue
            taken = clock() - start
            spent += taken
            if keep:
                samples[name].append(taken)
            if inspect is not None and name not in seen:
                seen.add(name)
                inspect(name, result)
            del result  # before the next line runs: two results need not fit together
        return spent

    with _no_collector():
        for index in range(warmups):
            one_round(index, keep=False)
        first = one_round(0, keep=True)
        for index in range(1, rounds_for(first, budget=budget, least=least, most=most)):
            one_round(index, keep=True)
    return {name: Timing(tuple(samples[name])) for name in alive}


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    """Python's cycle collector off: its pauses would fall on whichever line is running."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
