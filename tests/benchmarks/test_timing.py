"""The timing harness under a clock that the test moves."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest

from benchmarks.timing import Timing, interleave, rounds_for


class FakeClock:
    """A clock that only moves when a line 'works'."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def line(self, name: str, seconds: Callable[[], float]) -> Callable[[], str]:
        def work() -> str:
            self.calls.append(name)
            self.now += seconds()
            return f"{name} {self.calls.count(name)}"

        return work


def test_rounds_fill_the_budget_between_their_bounds() -> None:
    assert rounds_for(1.0, budget=10.0) == 10
    assert rounds_for(100.0, budget=10.0) == 3
    assert rounds_for(1e-6, budget=10.0) == 40
    assert rounds_for(0.0, budget=10.0) == 40


def test_lines_take_turns_and_the_first_changes_every_round() -> None:
    clock = FakeClock()
    lines = {name: clock.line(name, lambda: 1.0) for name in "abc"}
    found = interleave(lines, budget=12.0, warmups=1, clock=clock)
    assert {len(timing.samples) for timing in found.values()} == {4}
    rounds = ["".join(clock.calls[i : i + 3]) for i in range(0, len(clock.calls), 3)]
    assert rounds == ["abc", "abc", "bca", "cab", "abc"]  # the warm-up, then four


def test_a_drift_of_the_machine_does_not_move_the_ratio() -> None:
    clock = FakeClock()
    lines = {
        "floor": clock.line("floor", lambda: 1.0 + 0.002 * clock.now),
        "slow": clock.line("slow", lambda: 1.5 * (1.0 + 0.002 * clock.now)),
    }
    found = interleave(lines, budget=60.0, clock=clock)
    alone = found["floor"].samples
    assert alone[-1] / alone[0] > 1.1  # the machine did get slower
    assert found["slow"].over(found["floor"])["ratio"] == pytest.approx(1.5, rel=0.01)


def test_warm_up_is_not_counted_and_inspected_once_outside_the_time() -> None:
    clock = FakeClock()
    durations = iter([100.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    seen: list[tuple[str, str]] = []

    def inspect(name: str, result: str) -> None:
        seen.append((name, result))
        clock.now += 1000.0

    found = interleave(
        {"a": clock.line("a", lambda: next(durations))},
        budget=0.0,
        inspect=inspect,
        clock=clock,
    )
    assert found["a"].samples == (2.0, 2.0, 2.0)
    assert seen == [("a", "a 1")]


def test_a_line_that_raises_is_told_and_left_out() -> None:
    clock = FakeClock()
    told: list[tuple[str, str]] = []

    def broken() -> None:
        raise RuntimeError("no room")

    lines = {"a": clock.line("a", lambda: 1.0), "b": broken}
    found = interleave(
        lines, budget=5.0, on_error=lambda name, error: told.append((name, str(error))), clock=clock
    )
    assert told == [("b", "no room")]
    assert len(found["a"].samples) == 5
    assert "b" not in found
    with pytest.raises(RuntimeError, match="no room"):
        interleave(lines, budget=5.0, clock=clock)


def test_the_cycle_collector_comes_back_after_an_error() -> None:
    def broken() -> None:
        assert not gc.isenabled()
        raise RuntimeError

    assert gc.isenabled()
    with pytest.raises(RuntimeError):
        interleave({"a": broken})
    assert gc.isenabled()


def test_ratio_is_of_medians_with_the_spread_of_single_rounds() -> None:
    floor = Timing((1.0, 1.0, 1.0, 1.0, 10.0))
    line = Timing((2.0, 2.0, 3.0, 2.0, 20.0))
    assert line.over(floor) == {"ratio": 2.0, "ratio_low": 2.0, "ratio_high": 2.0}
    few = Timing((2.0, 3.0, 8.0)).over(Timing((1.0, 1.0, 2.0)))
    assert few == {"ratio": 3.0, "ratio_low": 2.0, "ratio_high": 4.0}
    with pytest.raises(ValueError, match="zip"):
        Timing((1.0,)).over(floor)
