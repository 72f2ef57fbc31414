"""The kinds of bias that a summary looks for: what counts, from where on, and how it is told."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from attnbias.report.data import ReportData

SINK_SHARE = 0.3
"""A head is a sink head from this share of attention to one fixed token on."""
NARROW_ENTROPY = 0.5
"""A head is narrow below this part of the entropy of even attention."""
LOCAL_DISTANCE = 0.25
"""A head is local below this part of the mean distance of even attention."""
RECEIVED_TIMES = 4.0
"""A word stands out from this many times its even share on, as the mean over all heads."""


@dataclass(frozen=True)
class Rule:
    """How one statistic becomes a finding.

    `passes` gets a value and the even value of its layer; `show` puts both in words.
    """

    key: str
    name: str
    most: bool
    passes: Callable[[float, float], bool]
    says: Callable[[ReportData], str]
    show: Callable[[float, float], str]
    threshold: str


def percent(value: float) -> str:
    """0.5 as "50%", with one digit below 10% and "under 0.1%" at the end of the scale."""
    if math.isnan(value):
        return "not measured"
    if 0 < value < 0.001:
        return "under 0.1%"
    return f"{value:.1%}" if value < 0.0995 else f"{value:.0%}"


def times(value: float) -> str:
    """2.345 as "2.3 times"."""
    if math.isnan(value):
        return "not measured"
    return (
        f"{value:.0f} times" if value >= 9.95 or value == RECEIVED_TIMES else f"{value:.1f} times"
    )


def _of_even(value: float, even: float) -> str:
    return percent(value / even) if even > 0 else "not measured"


def _sink(value: float, even: float) -> bool:
    return value >= max(SINK_SHARE, 2 * even)


def _share(value: float, even: float) -> str:
    return f"{percent(value)} (even: {percent(even)})"


def _goes_to(which: str, place: int | None) -> Callable[[ReportData], str]:
    return lambda data: (
        f"at least {percent(SINK_SHARE)} of the attention goes to {which}"
        + ("" if place is None else f" (“{data.tokens[place]}”)")
    )


def _share_rule(key: str, which: str, place: int | None = None) -> Rule:
    return Rule(
        key=key, name=f"attention to {which}", most=True, passes=_sink,
        says=_goes_to(which, place), show=_share,
        threshold=f"a head with {percent(SINK_SHARE)} or more of its attention on {which} "
        "(and at least twice the even share)",
    )  # fmt: skip


RULES = (
    _share_rule("first_token", "the first token", 0),
    _share_rule("previous_token", "the previous token"),
    _share_rule("next_token", "the next token"),
    _share_rule("own_token", "the token itself"),
    _share_rule("last_token", "the last token", -1),
    Rule(
        key="entropy", name="narrow attention", most=False,
        passes=lambda value, even: value < NARROW_ENTROPY * even,
        says=lambda _: "attention is narrow: its entropy is under "
        f"{percent(NARROW_ENTROPY)} of that of attention spread evenly",
        show=lambda value, even: f"{_of_even(value, even)} of even",
        threshold=f"a head with an entropy under {percent(NARROW_ENTROPY)} of that of even "
        "attention",
    ),
    Rule(
        key="distance", name="attention to near tokens", most=False,
        passes=lambda value, even: value < LOCAL_DISTANCE * even,
        says=lambda _: "attention stays near: its mean distance is under "
        f"{percent(LOCAL_DISTANCE)} of that of attention spread evenly",
        show=lambda value, even: f"{value:.1f} tokens (even: {even:.1f})",
        threshold=f"a head with a mean distance under {percent(LOCAL_DISTANCE)} of that of even "
        "attention",
    ),
)  # fmt: skip
