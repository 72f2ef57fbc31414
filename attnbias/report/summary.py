"""Findings in words, from templates: each with its number, its threshold and its two controls."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from attnbias.report.data import Cell, Map, ReportData, Word
from attnbias.report.thresholds import RECEIVED_TIMES, RULES, Rule, times

STANDING = (
    "Attention is not importance: a word that receives much attention need not matter to what the "
    "model says, and a word that matters may receive little. These numbers show where attention "
    "goes, not why, and not what would change without it."
)

NONE_FOUND = "No strong bias found."


@dataclass(frozen=True)
class Finding:
    """One statement: what was found, its number, what the controls show, and how to read it.

    Attributes:
        key, name: of the kind of bias looked for. strong: it passed, and random weights do not.
        statement: the number. strongest: the head (word) that shows most of it, with its interval.
        controls: the same number for the shuffled text and for random weights.
        interval: how the number moves within the 95% intervals, and what these are over.
        reading: what the controls mean. threshold: what was asked for.
        counts: heads (words) that pass in this text, shuffled, with random weights; out of `total`.
        heads: (tower, layer, head) of those that pass, the furthest first.
    """

    key: str
    name: str
    strong: bool
    statement: str
    strongest: str
    controls: tuple[str, str]
    reading: str
    threshold: str
    interval: str = ""
    counts: tuple[int, int, int] = (0, 0, 0)
    total: int = 0
    heads: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True)
class Summary:
    """All findings, the strong ones first; `verdict` is the sentence that stands on top."""

    verdict: str
    findings: tuple[Finding, ...]
    standing: str = STANDING

    @property
    def strong(self) -> tuple[Finding, ...]:
        """The findings over their threshold."""
        return tuple(one for one in self.findings if one.strong)


def summarise(data: ReportData) -> Summary:
    """The findings of `data`, each against its stated threshold and its two controls.

    A finding is strong when at least one head (or word) passes the threshold with the whole of its
    interval and, with random weights, fewer than half as many do: what an untrained model shows as
    well is told, but it is not called a bias of this model.
    """
    findings = [
        _map_finding(data, rule, one)
        for rule in RULES
        for one in data.maps
        if one.statistic == rule.key and one.cells()
    ]
    findings.append(_word_finding(data))
    findings.sort(key=lambda one: not one.strong)
    strong = [one for one in findings if one.strong]
    listed = ", ".join(one.name for one in strong)
    verdict = (
        f"{len(strong)} of the {len(findings)} kinds of bias looked for "
        f"stand{'s' if len(strong) == 1 else ''} out: {listed}."
        if strong
        else f"{NONE_FOUND} Of the {len(findings)} kinds looked for, none passed its threshold "
        "beyond what random weights show."
    )
    return Summary(verdict, tuple(findings))


def _passing(rule: Rule, cells: list[Cell], panel: str) -> int:
    return sum(rule.passes(getattr(cell, panel), cell.even) for cell in cells)


def _end(rule: Rule, cells: list[Cell], panel: str) -> tuple[Cell | None, str]:
    """The head furthest on the side that the rule looks at, against even attention."""
    known = [cell for cell in cells if not math.isnan(getattr(cell, panel)) and cell.even > 0]
    pick = max if rule.most else min
    best = pick(known, key=lambda cell: getattr(cell, panel) / cell.even, default=None)
    if best is None:
        return None, "not measured"
    return best, rule.show(getattr(best, panel), best.even)


def _reach(rule: Rule, cells: list[Cell]) -> tuple[int, int]:
    """Heads that pass with the whole of their interval, and with some of it."""
    ends = [
        sorted(
            rule.passes(cell.values if math.isnan(end) else end, cell.even)
            for end in (cell.low, cell.high)
        )
        for cell in cells
    ]
    return sum(sure for sure, _ in ends), sum(some for _, some in ends)


def _far(rule: Rule) -> Callable[[Cell], float]:
    """Sorts the heads furthest on the side that the rule looks at first."""
    return lambda cell: (-1 if rule.most else 1) * cell.values / max(cell.even, 1e-12)


def _interval(cells: list[Cell], blocks: int, sure: int, some: int) -> str:
    if all(math.isnan(cell.low) for cell in cells):
        return ""
    return (
        f"Within the 95% intervals (bootstrap over {blocks} blocks of query positions), {sure} to "
        f"{some} of {len(cells)} heads pass."
    )


def _between(rule: Rule, cell: Cell) -> str:
    """ "; 95% interval a to b" where there is one."""
    if math.isnan(cell.low):
        return rule.show(cell.values, cell.even)
    shown = rule.show(cell.values, cell.even)
    low, high = (rule.show(end, cell.even).partition(" (")[0] for end in (cell.low, cell.high))
    first, bracket, rest = shown.partition(" (")
    inside = f"95% interval {low} to {high}"
    return f"{first} ({inside}; {rest}" if bracket else f"{first} ({inside})"


def _map_finding(data: ReportData, rule: Rule, one: Map) -> Finding:
    cells = one.cells()
    total = len(cells)
    found, shuffled, random = (_passing(rule, cells, p) for p in ("values", "shuffled", "random"))
    tower = f" ({one.tower})" if len(data.towers) > 1 else ""
    kept = sum(
        rule.passes(cell.values, cell.even) and rule.passes(cell.shuffled, cell.even)
        for cell in cells
    )
    best, _ = _end(rule, cells, "values")
    value = "not measured" if best is None else _between(rule, best)
    sure, some = _reach(rule, cells)
    passing = sorted((c for c in cells if rule.passes(c.values, c.even)), key=_far(rule))
    word = "most" if rule.most else "least"
    statement = f"In {found} of {total} heads{tower} {rule.says(data)}."
    if not found:
        statement = f"No strong {rule.name}{tower}: no head of {total} passed the threshold."
    where = f"layer {best.layer}, head {best.head}, " if best else ""
    return Finding(
        key=rule.key,
        name=rule.name,
        strong=sure > 0 and 2 * random < found,
        statement=statement,
        strongest=f"The {word}: {where}{value}.",
        controls=(
            f"Same text, words shuffled: {shuffled} of {total} heads; {word} "
            f"{_end(rule, cells, 'shuffled')[1]}.",
            f"Same architecture, random weights: {random} of {total} heads; {word} "
            f"{_end(rule, cells, 'random')[1]}.",
        ),
        reading=_reading(found, kept, random),
        threshold=f"Threshold: {rule.threshold}.",
        interval=_interval(cells, data.blocks, sure, some),
        counts=(found, shuffled, random),
        total=total,
        heads=tuple((one.tower, cell.layer, cell.head) for cell in passing),
    )


def _reading(found: int, kept: int, random: int) -> str:
    """`kept`: of the heads (words) found, those that pass with the words shuffled as well."""
    if not found:
        return ""
    if 2 * random >= found:
        return "Random weights show it too: it comes with the architecture, not with training."
    if 2 * kept >= found:
        return (
            "It stays when the words are shuffled and is not there with random weights: training "
            "put it there, and it does not hang on the order of the words."
        )
    return (
        "It weakens when the words are shuffled and is not there with random weights: it hangs on "
        "the order of the words of this text."
    )


def _word_reading(found: int, kept: int, placed: int, random: int, causal: bool) -> str:
    """As `_reading`; `placed`: places over the threshold whatever word stands there."""
    if not found or 2 * random >= found or 2 * placed < found or 2 * kept >= found:
        return _reading(found, kept, random)
    told = (
        "It goes to places, not to words: other words shuffled into the same places receive it, "
        "the same words elsewhere do not."
    )
    ends = (
        " Each token sees only what is before it: the last ones are seen by few, so their even "
        "share is small, and attention to near tokens weighs much against it."
    )
    return told + (ends if causal else "")


def _word_finding(data: ReportData) -> Finding:
    def over(values: list[float]) -> int:
        return sum(value >= RECEIVED_TIMES for value in values)

    words = sorted(data.words, key=lambda word: -word.received)
    found, shuffled, random = (
        over([getattr(word, name) for word in words]) for name in ("received", "shuffled", "random")
    )
    kept = over([min(word.received, word.shuffled) for word in words])
    placed = over([min(word.received, word.in_place) for word in words])
    total, top = len(words), words[: max(1, min(3, found))]
    listed = ", ".join(f"“{word.text}” {times(word.received)}" for word in top)
    sure = over([word.received if math.isnan(word.low) else word.low for word in words])
    some = over([word.received if math.isnan(word.high) else word.high for word in words])
    statement = (
        f"{found} of {total} words receive at least {times(RECEIVED_TIMES)} their even share."
    )
    if found == 1:
        statement = f"1 of {total} words receives at least {times(RECEIVED_TIMES)} its even share."
    if not found:
        statement = (
            f"No strong attention to single words: none of {total} passed the threshold as the "
            "mean over all layers and heads."
        )
    return Finding(
        key="received",
        name="attention to single words",
        strong=sure > 0 and 2 * random < found,
        statement=statement,
        strongest=f"The most: {listed} the even share.",
        controls=_word_controls(top[0], total, shuffled, random),
        reading=_word_reading(found, kept, placed, random, data.causal),
        threshold=(
            f"Threshold: a word with {times(RECEIVED_TIMES)} its even share, mean over all heads."
        ),
        interval=_word_interval(top[0], sure, some),
        counts=(found, shuffled, random),
        total=total,
    )


def _word_interval(top: Word, sure: int, some: int) -> str:
    if math.isnan(top.low):
        return ""
    return (
        f"Within the 95% intervals (bootstrap over the heads) {sure} to {some} words pass; "
        f"“{top.text}” {times(top.low)} to {times(top.high)}."
    )


def _word_controls(top: Word, total: int, shuffled: int, random: int) -> tuple[str, str]:
    return (
        f"Same text, words shuffled: {shuffled} of {total} words; “{top.text}” "
        f"{times(top.shuffled)}, what stands in its place {times(top.in_place)}.",
        f"Same architecture, random weights: {random} of {total} words; “{top.text}” "
        f"{times(top.random)}.",
    )
