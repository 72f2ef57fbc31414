"""Charts as Vega-Lite specifications made with Altair. They draw numbers and escape nothing.

Colours of text and background are left to whoever draws (the page follows light and dark). The
scale of the maps is viridis: ordered in lightness, readable with any colour vision and in grey.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from attnbias.report.data import Map, ReportData, Word

PANELS = (
    ("values", "This text"),
    ("shuffled", "Control: words shuffled"),
    ("random", "Control: random weights"),
)
NUMBERS_UP_TO = 16
"""Up to so many layers and heads the number stands in the cell as well."""
CELL = 26
"""Pixels of a cell with its number."""
PANEL = 320
"""Pixels of a map without numbers; three stand side by side."""


def number(value: float, unit: str) -> str:
    """A value with its unit, as a reader sees it."""
    if math.isnan(value):
        return "not measured"
    if unit.startswith("share"):
        return f"{value:.1%}"
    if unit == "yes or no":
        return "yes" if value == 1 else "no" if value == 0 else f"{value:.0%} yes"
    return f"{value:.3g}" if unit == "value" else f"{value:.3g} {unit}"


def _says(unit: str) -> str:
    """`number` as a Vega expression: the page computes the words, it does not carry them."""
    value = "format(datum.value, '.3~r') + " + json.dumps(f" {unit}")
    if unit.startswith("share"):
        value = "format(datum.value, '.1%')"
    if unit == "yes or no":
        value = "(datum.value == 1 ? 'yes' : 'no')"
    return f"'Layer ' + datum.layer + ', head ' + datum.head + ': ' + {value}"


def _short(unit: str, high: float) -> str:
    """Expression of the value in two or three characters that fit a cell; shares in percent."""
    if unit.startswith("share"):
        return f"format(100 * datum.value, '{'.1f' if high < 0.0995 else '.0f'}')"
    if unit == "yes or no":
        return "format(datum.value, '.0f')"
    return "format(datum.value, abs(datum.value) < 9.95 ? '.1f' : '.0f')"


def top(one: Map) -> float:
    """Upper end of the colour scale: the largest value of the three panels, never 0."""
    if one.unit == "yes or no":
        return 1.0
    values = [x for cell in one.cells() for x in cell[2:5] if not math.isnan(x)]
    return max([*values, 1e-9])


def even(one: Map) -> str:
    """The value of even attention in words: one number, or a range where layers differ."""
    low, high = min(one.even), max(one.even)
    if math.isclose(low, high, rel_tol=1e-3):
        return number(high, one.unit)
    return f"{number(low, one.unit)} to {number(high, one.unit)}"


def rows(one: Map, panel: str) -> list[dict[str, Any]]:
    """The data of one panel, rounded to five digits; heads without a number are left out."""
    cells = [(cell, float(getattr(cell, panel))) for cell in one.cells()]
    return [
        {"layer": cell.layer, "head": cell.head, "value": float(f"{value:.5g}")}
        for cell, value in cells
        if not math.isnan(value)
    ]


def heat(one: Map, panel: str, title: str) -> alt.LayerChart:
    """One layer-by-head map: layers downwards, heads to the right; value in the cell, on hover.

    Its data is named like the panel and joins the specification last (`with_data`): Altair would
    check every number against its schema, which takes most of a minute for a large model.
    """
    heads, layers = max(len(row) for row in one.values), len(one.layers)
    numbers = max(heads, layers) <= NUMBERS_UP_TO
    cell = CELL if numbers else max(3, min(CELL, PANEL // heads))
    high = top(one)
    chart = (
        alt.Chart(title=title)
        .mark_rect(cursor="default")
        .encode(
            x=alt.X("head:O", axis=_axis("head", range(heads), numbers)),
            y=alt.Y("layer:O", axis=_axis("layer", one.layers, numbers), sort="ascending"),
            color=alt.Color(
                "value:Q",
                scale=alt.Scale(scheme="viridis", domain=[0, high]),
                legend=_legend(one.unit, high, min(220, heads * cell)),
            ),
            tooltip=alt.Tooltip("says:N", title=one.title),
            description=alt.Description("says:N"),
        )
        .properties(width=heads * cell, height=layers * (cell if numbers else min(cell, 12)))
    )
    parts: list[Any] = [chart]
    if numbers:
        # Black on the bright half, white on the dark: the switch is at luminance 0.18 of viridis.
        bright = alt.datum.value > 0.42 * high
        words = alt.Chart().mark_text(fontSize=10, aria=False, tooltip=None, clip=True)
        shade = alt.condition(bright, alt.value("black"), alt.value("white"))
        parts.append(words.encode(x="head:O", y="layer:O", text="short:N", color=shade))
    found: alt.LayerChart = alt.layer(*parts, data=alt.NamedData(name=panel)).transform_calculate(
        says=_says(one.unit), short=_short(one.unit, high)
    )
    return found


def with_data(chart: Any, one: Map, panels: Sequence[str]) -> dict[str, Any]:
    """The specification of a chart with the data of its maps."""
    made = chart.to_dict()
    own = {panel: rows(one, panel) for panel in panels}
    return {**made, "datasets": {**made.get("datasets", {}), **own}}


def _axis(title: str, numbers: Sequence[int], every: bool) -> alt.Axis:
    axis = alt.Axis(labelAngle=0, ticks=False, domain=False, grid=False, title=title)
    if not every:
        step = -(-len(numbers) // 12)
        axis.values = [n for n in numbers if n % step == 0]
    return axis


def _legend(unit: str, high: float, length: int) -> alt.Legend:
    form = (".1%" if high < 0.0995 else ".0%") if unit.startswith("share") else ".3~r"
    legend = alt.Legend(
        title=unit, orient="bottom", gradientLength=length, format=form, tickCount=4, titleLimit=300
    )
    if unit == "yes or no":
        legend.values = [0, 1]
    return legend


def _label(word: Word, index: int, length: int = 18) -> str:
    text = " ".join(word.text.split())
    text = text if len(text) <= length else text[: length - 1] + "…"
    return f"{text} ({index})"


def ranked(data: ReportData, width: int | str, count: int = 15) -> alt.LayerChart:
    """The words that receive most, with both controls: three shapes on one logarithmic axis."""
    order = sorted(range(len(data.words)), key=lambda i: -data.words[i].received)[:count]
    names = ("received", "shuffled", "random")
    titles = [title for _, title in PANELS]
    marks = [
        {
            "word": _label(data.words[i], i + 1),
            "times": getattr(data.words[i], name),
            "which": title,
            "says": f"{_label(data.words[i], i + 1)}, {title.lower()}: "
            f"{getattr(data.words[i], name):.2f} times the even share",
        }
        for i in order
        # Drawn in this order: the text lies over its controls.
        for name, title in reversed(list(zip(names, titles, strict=True)))
        if getattr(data.words[i], name) > 0
    ]
    base = alt.Chart(alt.Data(values=marks), title="Attention received by word")
    y = alt.Y(
        "word:N", sort=[_label(data.words[i], i + 1) for i in order],
        axis=alt.Axis(title="word (place in the text)", grid=True, ticks=False, domain=False),
    )  # fmt: skip
    x = alt.X(
        "times:Q", scale=alt.Scale(type="log", nice=False, padding=12),
        axis=alt.Axis(title="times the even share (log scale)", format=".3~r",
                      tickCount=5),
    )  # fmt: skip
    # One legend for both: the two scales share domain, order and legend, so Vega merges them.
    legend = alt.Legend(orient="top", columns=1, title=None)
    shapes = alt.Scale(domain=titles, range=["circle", "triangle-up", "square"])
    colours = alt.Scale(domain=titles, range=["#0072b2", "#e69f00", "#8c8c8c"])
    points = base.mark_point(size=80, filled=True, opacity=0.95).encode(
        x=x, y=y,
        shape=alt.Shape("which:N", scale=shapes, legend=legend),
        color=alt.Color("which:N", scale=colours, legend=legend),
        tooltip=alt.Tooltip("says:N", title="received attention"),
        description=alt.Description("says:N"),
    )  # fmt: skip
    even = (
        alt.Chart(alt.Data(values=[{"times": 1}]))
        .mark_rule(strokeDash=[4, 3], color="#888888", aria=False)
        .encode(x="times:Q")
    )
    return alt.layer(even, points).properties(width=width, height=max(3, len(order)) * 20)


def headline(data: ReportData) -> Map:
    """The map that the figure leads with: attention to the first token, else the first map."""
    return data.map("first_token") or data.maps[0]


def figure(data: ReportData) -> dict[str, Any]:
    """Specification of the main figure: the leading map with its controls over the ranked words."""
    one = headline(data)
    both = alt.vconcat(_row(data, one), ranked(data, 860), spacing=28)
    return _finished(both.resolve_scale(color="independent", shape="independent"), one)


def row(data: ReportData, one: Map) -> dict[str, Any]:
    """Specification of one map with its controls."""
    return _finished(_row(data, one), one)


def words(data: ReportData) -> dict[str, Any]:
    """Specification of the words that receive most."""
    made: dict[str, Any] = ranked(data, 860).configure(background="white", padding=16).to_dict()
    return made


def _row(data: ReportData, one: Map) -> alt.HConcatChart:
    made = alt.hconcat(*[heat(one, panel, title) for panel, title in PANELS])
    found: alt.HConcatChart = made.properties(
        title=alt.Title(f"{one.title}: {data.model}", fontSize=15)
    )
    return found


def _finished(chart: Any, one: Map) -> dict[str, Any]:
    shown = chart.configure(background="white", padding=16).configure_title(anchor="start")
    return with_data(shown, one, [panel for panel, _ in PANELS])
