"""Tables of heads in a notebook: HTML without a script, every string escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

LINES = 200
"""Layers of a statistic shown; more are in the files."""


def shade(part: float) -> str:
    """A CSS background from nothing (0) to blue (1), readable under dark and light text."""
    part = 0.0 if math.isnan(part) else min(max(part, 0.0), 1.0)
    return f"rgba(0,114,178,{0.5 * part:.2f})"


def heads(
    title: str, rows: Iterable[tuple[str, Sequence[float | None]]], note: str = "", base: float = 0
) -> str:
    """One table: a line for each layer, a column for each head, shaded from `base` to the largest.

    Args:
        title: what stands over it. rows: (name of the line, values; None where there is no head).
        note: a line under it. base: the value without shade.
    """
    lines = list(rows)
    known = [x for _, row in lines for x in row if x is not None and not math.isnan(x)]
    low = min([base, *known]) if known else base
    span = max([max(known, default=base) - low, 1e-12])
    width = max((len(row) for _, row in lines), default=0)
    head = "".join(f"<th>{n}</th>" for n in range(width))
    body = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th>'
        + "".join(_cell(x, low, span) for x in row)
        + "</tr>"
        for name, row in lines[:LINES]
    )
    left = len(lines) - LINES
    more = f"<p>{left} more lines; save() writes them all.</p>" if left > 0 else ""
    under = f"<p>{escape(note)}</p>" if note else ""
    return (
        f'<div class="attnbias"><table style="font-variant-numeric:tabular-nums">'
        f'<caption style="text-align:left">{escape(title)}</caption>'
        f"<thead><tr><th>layer \\ head</th>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"{more}{under}</div>"
    )


def _cell(value: float | None, low: float, span: float) -> str:
    if value is None:
        return "<td></td>"
    if math.isnan(value):
        return "<td>–</td>"
    return f'<td style="background:{shade((value - low) / span)}">{value:.3g}</td>'
