"""What the page shows of each statistic: its name for a reader, its unit, one plain sentence."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

from attnbias.errors import AttnbiasError

RECEIVED = "received[queries]"
SHARE = "share of attention"


@dataclass(frozen=True)
class Kind:
    """How one line of the table of `observe` is shown: its key in files, title, unit, meaning."""

    key: str
    title: str
    unit: str
    meaning: str


KNOWN = {
    "first_token": Kind(
        "first_token", "Attention to the first token", SHARE,
        "The part of its attention that a head gives to the first token, as the mean over all "
        "tokens.",
    ),
    "share[last]": Kind(
        "last_token", "Attention to the last token", SHARE,
        "The part of its attention that a head gives to the last token, as the mean over all "
        "tokens.",
    ),
    "offset": Kind(
        "previous_token", "Attention to the previous token", SHARE,
        "The part of its attention that a head gives to the token right before the one that looks.",
    ),
    "offset[0]": Kind(
        "own_token", "Attention to the token itself", SHARE,
        "The part of its attention that a token gives to itself.",
    ),
    "offset[1]": Kind(
        "next_token", "Attention to the next token", SHARE,
        "The part of its attention that a head gives to the token right after the one that looks.",
    ),
    RECEIVED: Kind(
        "received", "Attention to the most attended token", SHARE,
        "The part of its attention that a head gives to the one token that receives most from "
        "it, whichever that is.",
    ),
    "sink_rate": Kind(
        "sink_rate", "Sink heads", "yes or no",
        "Whether the tokens that can see the first token give it more than 30% of their "
        "attention on average (1: yes, 0: no).",
    ),
    "entropy": Kind(
        "entropy", "Entropy", "nats",
        "How widely a head spreads its attention: 0 is all on one token, higher is wider.",
    ),
    "distance": Kind(
        "distance", "Mean distance", "tokens",
        "How far from a token the tokens are that it attends to.",
    ),
    "peak[weight]": Kind(
        "peak[weight]", "Largest single weight", SHARE,
        "The largest part of its attention that a token gives to any one token, as the mean over "
        "all tokens.",
    ),
    "peak[position]": Kind(
        "peak[position]", "Place of the largest weight", "tokens from the start",
        "Where in the text the token stands that gets the largest weight, as the mean over all "
        "tokens.",
    ),
    "windowed_distance": Kind(
        "windowed_distance", "Distance up to a window", "tokens",
        "How far away a head looks, everything further than 10 tokens counting as 10.",
    ),
    "future_influence": Kind(
        "future_influence", "Attention from later tokens", SHARE,
        "What a token receives from the tokens 10 to 50 after it, as the mean over the tokens that "
        "have such: high where later text comes back to earlier tokens.",
    ),
}  # fmt: skip
MOST_LINES = 4
"""A statistic that gives more lines than that for a head is a profile, not a map."""


def candidates() -> list[Any]:
    """The statistics that need no argument, in the order of the list that a reader chooses from.

    The offsets -1, 0 and 1, the last token and what other packages add are among them. Whether each
    can be measured on a text is tried out by `collect`.
    """
    from attnbias.observe import statistics

    known = [
        statistics.FirstToken(), statistics.Share(("last",)), statistics.Offset(-1),
        statistics.Offset(0), statistics.Offset(1), statistics.Received("queries"),
        statistics.SinkRate(), statistics.Entropy(), statistics.Distance(),
    ]  # fmt: skip
    taken = {type(one) for one in known}
    more = []
    for word in statistics.available():
        kind = statistics.by_name(word)
        if kind in taken:
            continue
        try:
            one = kind()
            one.check(("last",))
        except (TypeError, AttnbiasError):
            continue
        if not one.aims:
            more.append(one)
    return [*known, *more]


def kind_of(statistic: Any, label: str) -> Kind:
    """How a line is shown; what no one has described here takes the words of its docstring."""
    if label in KNOWN:
        return KNOWN[label]
    if label.startswith("sink_rate"):
        return KNOWN["sink_rate"]
    entry = label[len(statistic.name) :].strip("[]")
    title = statistic.name.replace("_", " ").capitalize()
    return Kind(label, f"{title}: {entry}" if entry else title, "value", _sentence(statistic))


def _sentence(statistic: Any) -> str:
    """The first sentence of a docstring, without markup."""
    text = " ".join(inspect.cleandoc(type(statistic).__doc__ or "").partition("\n\n")[0].split())
    text = re.sub(r":\w+:`([^`]*)`", r"\1", text).replace("`", "").replace("**", "")
    first = re.split(r"(?<=[.:])\s", text, maxsplit=1)[0].rstrip(":")
    return first if first.endswith(".") else f"{first}."
