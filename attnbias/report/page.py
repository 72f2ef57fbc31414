"""One self-contained HTML page, and the main figure as PNG, from the numbers of a report."""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import itertools
import json
import math
from pathlib import Path
from typing import Any

from attnbias.report import charts
from attnbias.report.clean import visible
from attnbias.report.data import Map, ReportData, Word
from attnbias.report.summary import summarise

LEVELS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Edges of the six shades of a word, in times its even share."""
VEGA_LITE = "6.4"
_HERE = Path(__file__).parent

GLOSSARY = (
    ("Attention", "For every token, a head gives each token it may see a share; the shares of one "
     "token add up to 100%. The token then reads the others in these proportions."),
    ("Bias", "A tilt of these shares that does not come from what the text says: towards a place, "
     "a distance, a kind of token."),
    ("Control", "The same measurement where the thing looked for cannot be: with the words in "
     "random order, and in the same architecture with random weights."),
    ("Even share", "What a token would receive if every token spread its attention evenly over "
     "the tokens it can see."),
    ("Head, layer", "A layer holds several heads that attend side by side; layers follow one "
     "another."),
    ("Random weights", "The untrained model: same build, weights drawn anew from a fixed seed."),
    ("Sink", "A token, often the first, that receives much attention whatever it is: a place to "
     "put attention that has nowhere else to go."),
    ("Token", "The piece of text a model reads: a word, a part of one, a sign, or a special token "
     "such as [CLS] that the tokenizer adds."),
)  # fmt: skip


def clean(data: ReportData) -> ReportData:
    """A copy whose every string shows its control and bidirectional characters."""

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return visible(value)
        if isinstance(value, tuple):
            return tuple(walk(one) for one in value)
        if isinstance(value, (Map, Word)):
            return _replaced(value)
        return value

    def _replaced(value: Any) -> Any:
        fields = {f.name: walk(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)

    found: ReportData = _replaced(data)
    return found


def render(data: ReportData) -> bytes:
    """The page in UTF-8. Equal data give equal bytes; the page makes no network request.

    All text is taken for hostile: escaped by the template in HTML, by `in_script` in the chart
    data, shown by `clean` where it is invisible; a content policy forbids every script but the
    page's own two (by hash), every connection and every foreign resource.
    """
    import jinja2
    from markupsafe import Markup

    digest = data.text_hash
    shown = clean(data)
    specs = _specs(shown)
    script = (_HERE / "page.js").read_text("utf-8")
    library = _library()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    payload = {
        "levels": LEVELS,
        "charts": specs,
        "words": [
            {
                "text": word.text,
                "all": _number(word.received),
                "layers": [_number(x) for x in word.by_layer],
                "shuffled": _number(word.shuffled),
                "place": _number(word.in_place),
                "random": _number(word.random),
            }
            for word in shown.words
        ],
    }
    html = environment.get_template("page.html.j2").render(
        data=shown,
        summary=summarise(shown),
        policy=_policy(library, script),
        css=Markup((_HERE / "page.css").read_text("utf-8")),
        script=Markup(script),
        library=Markup(library),
        payload=Markup(in_script(payload)),
        legend=_legend(),
        words=_words(shown),
        maps=[_panels(shown, i, one) for i, one in enumerate(shown.maps)],
        tables=_tables(shown),
        glossary=GLOSSARY,
        made=_made(shown, digest),
    )
    return html.encode("utf-8", "replace")


def png(data: ReportData, scale: float = 2.0) -> bytes:
    """The main figure as PNG: the leading map with its controls over the ranked words."""
    import vl_convert

    spec = charts.figure(clean(data))
    image: bytes = vl_convert.vegalite_to_png(
        json.dumps(spec), vl_version=VEGA_LITE, scale=scale, allowed_base_urls=[]
    )
    return image


def in_script(value: Any) -> str:
    """JSON that cannot end or open a script element, in the characters that every browser reads."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


@functools.cache
def _library() -> str:
    import vl_convert

    return str(vl_convert.javascript_bundle(vl_version=VEGA_LITE))  # type: ignore[call-arg]


def _policy(*scripts: str) -> str:
    hashes = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in scripts]
    allowed = " ".join(f"'sha256-{one}'" for one in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _number(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def _times(value: float) -> str:
    if math.isnan(value):
        return "not measured"
    return f"{value:.2f}×" if value < 0.095 else f"{value:.1f}×"


def _legend() -> list[str]:
    edges = [f"{edge:g}×" for edge in LEVELS]
    middle = [f"{low} to {high}" for low, high in itertools.pairwise(edges)]
    return [f"under {edges[0]}", *middle, f"{edges[-1]} and more"]


def _specs(data: ReportData) -> dict[str, Any]:
    found = {"ranked": charts.ranked(data, "container").to_dict()}
    for i, one in enumerate(data.maps):
        for panel, title in charts.PANELS:
            found[f"map{i}-{panel}"] = charts.with_data(
                charts.heat(one, panel, title), one, [panel]
            )
    return found


def _words(data: ReportData) -> list[dict[str, Any]]:
    found = []
    for word in data.words:
        level = sum(word.received >= edge for edge in LEVELS)
        times = _times(word.received)
        cells = [f"{x:.3f}" for x in (word.received, word.shuffled, word.in_place, word.random)]
        found.append({
            "text": word.text, "special": word.special, "level": level, "times": times,
            "gap": word.gap,
            "title": f"mean of all layers: {times} the even share",
            "cells": [*cells, f"{word.share:.2%}"],
        })  # fmt: skip
    return found


def _name(data: ReportData, one: Map) -> str:
    return f"{one.title} ({one.tower})" if len(data.towers) > 1 else one.title


def _panels(data: ReportData, index: int, one: Map) -> dict[str, Any]:
    return {
        "key": f"map{index}",
        "title": _name(data, one),
        "meaning": one.meaning,
        "even": charts.even(one),
        "heads": max(len(row) for row in one.values),
        "panels": [
            {"key": f"map{index}-{panel}", "title": title} for panel, title in charts.PANELS
        ],
    }


def _tables(data: ReportData) -> list[dict[str, Any]]:
    return [
        {
            "name": _name(data, one),
            "caption": f"{one.meaning} Unit: {one.unit}; even attention: "
            f"{charts.even(one)}.",
            "head": ["layer", "head", *(title for _, title in charts.PANELS)],
            "rows": [[*cell[:2], *(f"{x:.4g}" for x in cell[2:5])] for cell in one.cells()],
        }
        for one in data.maps
    ]  # fmt: skip


def _made(data: ReportData, digest: str) -> list[tuple[str, str]]:
    return [
        ("Model", data.model),
        ("Weights", data.revision or "unknown"),
        ("Architecture", data.architecture),
        ("Text", f"SHA-256 {digest}"),
        ("attnbias", data.version),
        *data.settings,
    ]
