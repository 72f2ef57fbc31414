"""One self-contained HTML page, and the main figure as PNG, from the numbers of a report."""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnbias.errors import AttnbiasError
from attnbias.report import charts
from attnbias.report.clean import visible
from attnbias.report.compare import compared
from attnbias.report.data import Map, Profile, ReportData, Word
from attnbias.report.glossary import GLOSSARY
from attnbias.report.payload import DETAILS, Detail, packed, told
from attnbias.report.summary import Summary, summarise

LEVELS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Edges of the six shades of a word, in times its even share."""
VEGA_LITE = "6.4"
WEB = Path(__file__).parent / "web"
SCRIPTS = ("core", "figures", "words", "maps", "head", "tables")
LARGEST = 10_000_000
"""Bytes of a page; what does not fit is left out, the finest detail first."""
TABLE_WORDS = 1000
NAMED = 6
"""Heads of a finding that the page links to."""


def clean(data: ReportData) -> ReportData:
    """A copy whose every string shows its control and bidirectional characters."""

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return visible(value)
        if isinstance(value, tuple):
            if not value or isinstance(value[0], (float, int)):
                return value  # long rows of numbers
            return tuple(walk(one) for one in value)
        if isinstance(value, (Map, Word)):
            return _replaced(value)
        if isinstance(value, Profile):
            return dataclasses.replace(value, tower=visible(value.tower))
        return value

    def _replaced(value: Any) -> Any:
        fields = {f.name: walk(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)

    found: ReportData = _replaced(data)
    return found


def render(data: ReportData, other: ReportData | None = None) -> bytes:
    """The page in UTF-8, at most `LARGEST` bytes. Equal data give equal bytes; no network request.

    All text is taken for hostile: escaped by the template in HTML, by `in_script` in the data of
    the script, shown by `clean` where it is invisible; a content policy forbids every script but
    the page's own two (by hash), every connection and every foreign resource.

    Args:
        data: the report. other: a second one to stand beside it (same scales, differences).
    """
    for detail in DETAILS:
        page = _render(data, other, detail)
        if len(page) <= LARGEST:
            return page
    raise AttnbiasError(
        f"the page would be {len(page) / 1e6:.0f} MB; choose some layers, or write --csv and --json"
    )


def _render(data: ReportData, other: ReportData | None, detail: Detail) -> bytes:
    import jinja2
    from markupsafe import Markup

    given = [data] if other is None else [data, other]
    shown, digests = [clean(one) for one in given], [one.text_hash for one in given]
    first = shown[0]
    names = short_names(shown)
    summaries = [summarise(one) for one in shown]
    script = _script()
    library = _library()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(WEB), autoescape=True, trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    heads = _linked(summaries[0])
    runs = [packed(one, name, detail) for one, name in zip(shown, names, strict=True)]
    payload = {
        "levels": LEVELS,
        "runs": runs,
        "first": heads[0] if heads else _first(first),
        "heads": heads,
        "findings": _findings(summaries[0]),
    }
    run = runs[0]
    html = environment.get_template("page.html.j2").render(
        data=first,
        names=names,
        summary=summaries[0],
        heads=heads,
        statistics=[_name(first, one) for one in first.maps],
        chosen=_chosen(first, summaries[0]),
        policy=_policy(library, script),
        css=Markup((WEB / "page.css").read_text("utf-8")),
        script=Markup(script),
        library=Markup(library),
        payload=Markup(in_script(payload)),
        legend=_legend(),
        texts=[
            _text(one, r["words"], names[n] if other else "")
            for n, (one, r) in enumerate(zip(shown, runs, strict=True))
        ],
        table=_words(first)[:TABLE_WORDS],
        tokens_map=bool(run["maps"] and run["maps"][0]),
        profiles=bool(first.profiles),
        most=(max(n for _, n in first.layers), max(len(r) for m in first.maps for r in m.values)),
        comparison=None if other is None else compared(shown[0], shown[1], summaries),
        glossary=GLOSSARY,
        detail=detail,
        made=[_made(one, digest, detail) for one, digest in zip(shown, digests, strict=True)],
        cite=[citation(one, digest) for one, digest in zip(shown, digests, strict=True)],
    )  # fmt: skip
    return html.encode("utf-8", "replace")


def png(data: ReportData, scale: float = 2.0) -> bytes:
    """The main figure as PNG: the leading map with its controls over the ranked words."""
    return _drawn(charts.figure(clean(data)), "png", scale)


def svg(data: ReportData) -> bytes:
    """The main figure as SVG."""
    return _drawn(charts.figure(clean(data)), "svg")


def figures(data: ReportData, scale: float = 2.0) -> dict[str, bytes]:
    """Every map with its controls, and the ranked words, as PNG and SVG by file name."""
    shown = clean(data)
    specs = {"words": charts.words(shown)}
    for one in shown.maps:
        tower = f"-{one.tower}" if len(shown.towers) > 1 else ""
        plain = re.sub(r"[^a-z0-9]+", "-", f"{one.statistic}{tower}".lower()).strip("-")
        specs[plain] = charts.row(shown, one)
    return {
        f"{name}.{kind}": _drawn(spec, kind, scale)
        for name, spec in specs.items()
        for kind in ("png", "svg")
    }


def _drawn(spec: dict[str, Any], kind: str, scale: float = 1.0) -> bytes:
    import vl_convert

    options: dict[str, Any] = {"vl_version": VEGA_LITE, "allowed_base_urls": []}
    if kind == "svg":
        return str(vl_convert.vegalite_to_svg(json.dumps(spec), **options)).encode("utf-8")
    image: bytes = vl_convert.vegalite_to_png(json.dumps(spec), scale=scale, **options)
    return image


def in_script(value: Any) -> str:
    """JSON that cannot end or open a script element, in the characters that every browser reads."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


@functools.cache
def _script() -> str:
    parts = [(WEB / f"{name}.js").read_text("utf-8") for name in SCRIPTS]
    return '"use strict";\n(function () {\n' + "\n".join(parts) + "})();\n"


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


def _times(value: float) -> str:
    if math.isnan(value):
        return "not measured"
    return f"{value:.2f}×" if value < 0.095 else f"{value:.1f}×"


def _legend() -> list[str]:
    edges = [f"{edge:g}×" for edge in LEVELS]
    middle = [f"{low} to {high}" for low, high in itertools.pairwise(edges)]
    return [f"under {edges[0]}", *middle, f"{edges[-1]} and more"]


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


def _linked(summary: Summary) -> list[tuple[str, int, int]]:
    """Heads that the summary names, in its order; buttons refer to them by number."""
    found = [head for one in summary.findings for head in one.heads[:NAMED]]
    return list(dict.fromkeys(found))


def _findings(summary: Summary) -> dict[str, list[str]]:
    """tower/layer/head -> the kinds of bias whose threshold it passes."""
    found: dict[str, list[str]] = {}
    for one in summary.findings:
        for tower, layer, head in one.heads:
            found.setdefault(f"{tower}/{layer}/{head}", []).append(one.name)
    return found


def _first(data: ReportData) -> tuple[str, int, int]:
    one = data.maps[0]
    cell = one.cells()[0]
    return (one.tower, cell.layer, cell.head)


def _chosen(data: ReportData, summary: Summary) -> int:
    """The statistic drawn first: that of the first finding that stands out."""
    keys = [one.statistic for one in data.maps]
    for finding in summary.strong:
        if finding.key in keys and finding.heads:
            return keys.index(finding.key)
    return 0


def short_names(shown: Sequence[ReportData]) -> list[str]:
    """What tells the runs apart: the model, else the rules, else the beginning of the text."""
    names = [one.model for one in shown]
    if len(set(names)) < len(names):
        names = [dict(one.settings).get("Rules", "as trained") for one in shown]
    if len(set(names)) < len(names):
        names = [" ".join(one.text.split())[:40] for one in shown]
    if len(set(names)) < len(names):
        names = [f"run {n + 1}" for n in range(len(shown))]
    return [name if len(name) <= 48 else name[:47] + "…" for name in names]


def _text(data: ReportData, words: dict[str, Any], name: str) -> dict[str, Any]:
    """A text in the template: its words where they fit on one screen or two, else its sections."""
    long = bool(words["sections"])
    return {
        "name": name, "sections": words["sections"], "left": len(data.words) - len(words["text"]),
        "words": [] if long else _words(data),
    }  # fmt: skip


def citation(data: ReportData, digest: str) -> str:
    """One line that says what was measured with what."""
    revision = data.revision or "revision unknown"
    return (
        f"Attention of {data.model} ({revision}) on a text of {len(data.tokens)} tokens (SHA-256 "
        f"{digest[:16]}…), measured with attnbias {data.version}."
    )


def _made(data: ReportData, digest: str, detail: Detail) -> list[tuple[str, str]]:
    left = told(detail)
    return [
        ("Model", data.model),
        ("Weights", data.revision or "unknown"),
        ("Architecture", data.architecture),
        ("Text", f"SHA-256 {digest}"),
        ("attnbias", data.version),
        *data.settings,
        *([("Left out to keep the page small", left)] if left else []),
    ]
