"""The numbers of a report packed for the page: base64 of little-endian arrays."""

from __future__ import annotations

import base64
import math
import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from attnbias.report.data import Map, Profile, ReportData, Word

SECTIONS_FROM = 700
"""Texts of more words are shown section by section."""
SECTIONS = 200


@dataclass(frozen=True)
class Detail:
    """How much of a report the page carries; `DETAILS` from the most to the least.

    Attributes:
        maps: maps over the tokens. bins: bins of received attention at most. top: keys a head.
        layers: what each word receives in each layer. words: words of the text at most.
    """

    maps: bool = True
    bins: int = 512
    layers: bool = True
    words: int = 60_000
    top: int = 64


DETAILS = (
    Detail(),
    Detail(maps=False),
    Detail(maps=False, bins=256, layers=False, words=40_000),
    Detail(maps=False, bins=128, layers=False, words=20_000),
    Detail(maps=False, bins=64, layers=False, words=5_000, top=32),
    Detail(maps=False, bins=32, layers=False, words=2_000, top=8),
)


def told(detail: Detail) -> str:
    """What a page of this detail leaves out, in words; "" where it leaves out nothing."""
    most = DETAILS[0]
    parts = [
        (detail.maps != most.maps, "maps over the tokens"),
        (detail.layers != most.layers, "what each word receives layer by layer"),
        (detail.bins != most.bins, f"positions in more than {detail.bins} bins"),
        (detail.words != most.words, f"words after the first {detail.words}"),
        (detail.top != most.top, f"keys of a head after the first {detail.top}"),
    ]
    return "; ".join(word for wanted, word in parts if wanted)


def packed(data: ReportData, short: str, detail: Detail) -> dict[str, Any]:
    """One run as the page's script reads it (`Run` in web/core.js)."""
    length = len(data.tokens)
    step = max(1, -(-len(data.bins) // detail.bins)) if data.bins else 1
    profiles = data.profiles
    heads: list[tuple[str, int, int]] = [(p.tower, p.layer, p.head) for p in profiles]
    if not heads:
        heads = [(m.tower, c.layer, c.head) for m in data.maps[:1] for c in m.cells()]
    return {
        "short": short,
        "causal": data.causal,
        "towers": data.towers,
        "layers": data.layers,
        "heads": heads,
        "stats": [_stat(one) for one in data.maps],
        "words": _words(data, detail),
        "tokens": data.tokens if length <= 512 else [],
        "bin_tokens": data.tokens if length <= 512 and step == 1 and length == len(data.bins)
        else None,
        "bins": data.bins[::step],
        "even_received": [_number(_sums(row, step)) for row in data.even_received],
        "gaps": data.gaps,
        "even_near": [_number(row) for row in data.even_near],
        "profiles": _profiles(profiles, step, detail.top),
        "top_tokens": {
            place: data.tokens[place]
            for p in profiles for place, _ in p.top[: detail.top] if place < length
        },
        "maps": [p.map for p in profiles] if detail.maps else [],
    }  # fmt: skip


def floats(values: Iterable[float]) -> str:
    """float32, little-endian, base64."""
    return _coded(array("f", values))


def shares(values: Iterable[float]) -> str:
    """Shares of 0 to 1 as 65535 sqrt(share) in two bytes."""
    top = 65535
    found = (0 if math.isnan(x) else round(top * math.sqrt(min(max(x, 0), 1))) for x in values)
    return _coded(array("H", found))


def _coded(values: array[Any]) -> str:
    if struct.pack("=H", 1) != struct.pack("<H", 1):
        values.byteswap()
    return base64.b64encode(values.tobytes()).decode("ascii")


def _stat(one: Map) -> dict[str, Any]:
    width = max(len(row) for row in one.values)
    none = tuple(tuple(math.nan for _ in row) for row in one.values)
    grids = (one.values, one.shuffled, one.random, one.low or none, one.high or none)
    flat = (x for grid in grids for row in grid for x in (*row, *([math.nan] * (width - len(row)))))
    return {
        "key": one.statistic, "title": one.title, "unit": one.unit, "meaning": one.meaning,
        "tower": one.tower, "layers": one.layers, "width": width,
        "even": [float(f"{x:.7g}") if math.isfinite(x) else 0.0 for x in one.even],
        "pack": floats(flat),
    }  # fmt: skip


def _profiles(profiles: Sequence[Profile], step: int, top: int) -> dict[str, str]:
    if not profiles:
        return {}
    count = min(top, max(len(p.top) for p in profiles))
    found = {
        "received": shares(x for p in profiles for x in _sums(p.received, step)),
        "top_share": shares(x for p in profiles for _, x in _filled(p, count)),
        "top_place": _coded(array("I", (n for p in profiles for n, _ in _filled(p, count)))),
    }
    for name in ("near", "near_shuffled", "near_random"):
        rows = [getattr(p, name) for p in profiles]
        if all(rows):
            found[name] = shares(x for row in rows for x in row)
    return found


def _filled(one: Profile, count: int) -> list[tuple[int, float]]:
    return [*one.top[:count], *([(0, 0.0)] * (count - len(one.top[:count])))]


def _sums(row: Sequence[float], step: int) -> list[float]:
    return [sum(row[n : n + step]) for n in range(0, len(row), step)]


def _number(row: Iterable[float]) -> list[float]:
    return [float(f"{x:.5g}") for x in row]


def _words(data: ReportData, detail: Detail) -> dict[str, Any]:
    words = data.words[: detail.words]
    columns = {
        "all": "received", "shuffled": "shuffled", "place": "in_place", "random": "random",
        "share": "share",
    }  # fmt: skip
    found: dict[str, Any] = {
        name: floats(getattr(word, field) for word in words) for name, field in columns.items()
    }
    rows = len(data.layers) if detail.layers else 0
    return {
        **found,
        "layers": floats(word.by_layer[n] for n in range(rows) for word in words) if rows else "",
        "text": [word.text for word in words],
        "special": [n for n, word in enumerate(words) if word.special],
        "gap": {n: word.gap for n, word in enumerate(words) if word.gap != " "},
        "sections": sections(words) if len(words) > SECTIONS_FROM else [],
    }


def sections(words: Sequence[Word]) -> list[dict[str, Any]]:
    """A long text in at most about SECTIONS parts, cut at paragraphs where there are some."""
    wanted = max(60, -(-len(words) // SECTIONS))
    starts = [0]
    for n, word in enumerate(words[:-1], 1):
        size = n - starts[-1]
        if (size >= wanted and "\n" in word.gap) or size >= 3 * wanted:
            starts.append(n)
    found = []
    for start, stop in zip(starts, [*starts[1:], len(words)], strict=True):
        part = words[start:stop]
        found.append({
            "start": start, "stop": stop,
            "label": " ".join(w.text for w in part[:9] if not w.special),
            "mean": round(sum(w.received for w in part) / len(part), 4),
            "most": round(max(w.received for w in part), 4),
        })  # fmt: skip
    return found
