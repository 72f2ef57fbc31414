"""A statistic drawn over the image that the model saw: SVG, PNG, and a piece of HTML.

A disc over each patch has an area in proportion to the value; its shade says the same again. The
highest patches are numbered and listed with their row and column, so nothing hangs on colour.
"""

from __future__ import annotations

import html
from dataclasses import dataclass

import torch
from torch import Tensor

from attnbias.errors import AttnbiasError
from attnbias.report.clean import visible
from attnbias.report.pixels import data_uri, shade
from attnbias.report.towers import CONTROLS, FOLLOWED, RANDOM, SHUFFLED, ImageSeen, Surface

WIDTH = 480
"""Pixels of the longer side of the image in a figure."""
LISTED = 5
LARGEST = 30
"""Radius in pixels of the largest disc, where patches are large."""
STRONG, OVER = 2.0, 1.5
"""A patch stands out from so many times the even share, and so many times random weights."""
ALIKE = 0.5
"""Correlation from which two figures are called alike."""
EDGE, SIDE, FOOT = 30, 230, 16


@dataclass(frozen=True)
class Patch:
    """A patch with its value; row and column count from 1, from the top left."""

    row: int
    column: int
    value: float

    def __str__(self) -> str:
        return f"row {self.row}, column {self.column}: {times(self.value)}"


def times(value: float) -> str:
    """A value in times the even share, as a reader sees it."""
    return f"{value:.2f}×" if value < 0.995 else f"{value:.1f}×"


def highest(values: Tensor, count: int = LISTED) -> list[Patch]:
    """The patches with the highest values ``(rows, columns)``, the first of equal ones first."""
    flat = values.flatten().nan_to_num(-torch.inf)
    order = torch.sort(flat, descending=True, stable=True).indices[:count].tolist()
    columns = values.shape[1]
    return [Patch(n // columns + 1, n % columns + 1, float(flat[n])) for n in order]


def chosen(surface: Surface, layer: int | None = None, head: int | None = None) -> Tensor:
    """``(rows, columns)``: one head, the mean over the heads of a layer, or over all."""
    if head is None:
        return surface.mean(layer)
    if layer is None:
        raise AttnbiasError("a head is named without its layer; write layer=..., head=....")
    return surface.head(layer, head)


def svg(
    seen: ImageSeen, key: str = "received", layer: int | None = None, head: int | None = None
) -> str:
    """The figure as SVG, with the image inside it.

    Args:
        seen: what was seen. key: of the surface. layer, head: one layer, or one head of it; the
            mean over all by default.
    """
    surface = surface_of(seen, key)
    values = chosen(surface, layer, head)
    rows, columns = values.shape
    high, wide = seen.picture.pixels.shape[:2]
    scale = WIDTH / max(high, wide)
    width, height = wide * scale, high * scale
    cell = min(width / columns, height / rows, 2.0 * LARGEST)
    top = max(float(values.nan_to_num(0.0).max()), 1e-12)
    title = f"{surface.title}, {which(layer, head)}"
    most = highest(values)
    body = [
        f'<image x="0" y="0" width="{width:.1f}" height="{height:.1f}" '
        f'preserveAspectRatio="none" href="{data_uri(seen.picture.pixels)}"/>'
    ]
    for row in range(rows):
        for column in range(columns):
            value = float(values[row, column])
            radius = 0.5 * cell * max(value / top, 0.0) ** 0.5 if value == value else 0.0
            if radius < 0.3:
                continue
            x, y = (column + 0.5) * width / columns, (row + 0.5) * height / rows
            body.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{shade(value / top)}"/>'
            )
    for place, patch in enumerate(most, 1):
        x, y = (patch.column - 0.5) * width / columns, (patch.row - 0.5) * height / rows
        body.append(f'<text class="mark" x="{x:.1f}" y="{y + 4:.1f}">{place}</text>')
    ticks = [
        f'<text class="tick" x="{(n - 0.5) * width / columns:.1f}" y="-6">{n}</text>'
        for n in steps(columns)
    ] + [
        f'<text class="tick side" x="-6" y="{(n - 0.5) * height / rows + 3:.1f}">{n}</text>'
        for n in steps(rows)
    ]
    full, tall = width + EDGE + SIDE, max(height, 270) + 2 * EDGE + FOOT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{full:.0f}" '
        f'height="{tall:.0f}" viewBox="0 0 {full:.0f} {tall:.0f}" '
        f'aria-label="{attribute(described(title, most))}" '
        'font-family="system-ui, DejaVu Sans, sans-serif" font-size="13">'
        "<style>.mark{font-weight:700;text-anchor:middle;fill:#fff;stroke:#000;stroke-width:3px;"
        "paint-order:stroke}.tick{font-size:10px;text-anchor:middle;fill:#555}"
        ".side{text-anchor:end}circle{fill-opacity:.8;stroke:#fff;stroke-width:.8}"
        "</style>"
        f'<rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="{EDGE}" y="16" font-size="14" font-weight="700">{words(title)}</text>'
        f'<g transform="translate({EDGE},{EDGE + FOOT})">{"".join(ticks)}{"".join(body)}</g>'
        f'<g transform="translate({EDGE + width + 14:.1f},{EDGE + FOOT})">'
        f"{_legend(top, cell, most)}</g></svg>"
    )


def _legend(top: float, cell: float, most: list[Patch]) -> str:
    lines = ['<text x="0" y="10" font-weight="700">Area of a disc</text>']
    y = 34.0
    for value in dict.fromkeys((top, top / 4, *([1.0] if top > 1.5 else []))):
        radius = max(0.5 * cell * (value / top) ** 0.5, 0.8)
        says = times(value) + (" (even share)" if value == 1.0 else "")
        lines.append(
            f'<circle cx="{0.5 * cell:.1f}" cy="{y:.1f}" r="{radius:.1f}" '
            f'fill="{shade(value / top)}" style="stroke:#555"/>'
            f'<text x="{cell + 8:.1f}" y="{y + 4:.1f}">{says}</text>'
        )
        y += max(cell, 20) + 2
    y += 10
    lines.append(f'<text x="0" y="{y:.1f}" font-weight="700">Highest patches</text>')
    for place, patch in enumerate(most, 1):
        y += 20
        lines.append(f'<text x="0" y="{y:.1f}">{place}. {words(str(patch))}</text>')
    return "".join(lines)


def png(
    seen: ImageSeen,
    key: str = "received",
    layer: int | None = None,
    head: int | None = None,
    scale: float = 2.0,
) -> bytes:
    """The same figure as PNG."""
    import vl_convert

    image: bytes = vl_convert.svg_to_png(svg(seen, key, layer, head), scale=scale)
    return image


def fragment(
    seen: ImageSeen, key: str = "received", layer: int | None = None, head: int | None = None
) -> str:
    """The figure with its caption and a table of its numbers, as HTML that needs nothing else."""
    surface = surface_of(seen, key)
    values = chosen(surface, layer, head)
    rows, columns = values.shape
    cells = "".join(
        f'<tr><th scope="row">{row + 1}</th>'
        + "".join(f"<td>{float(values[row, column]):.2f}</td>" for column in range(columns))
        + "</tr>"
        for row in range(rows)
    )
    head_row = "".join(f'<th scope="col">{n + 1}</th>' for n in range(columns))
    return (
        f'<figure class="overlay">{svg(seen, key, layer, head)}'
        f"<figcaption>{words(surface.meaning)} {words(says(surface, layer, head))}</figcaption>"
        "<details><summary>All numbers of this figure</summary>"
        f'<div class="scroll"><table><caption>{words(surface.title)}, '
        f"{which(layer, head)}, in times the even share; rows and columns of patches</caption>"
        f'<thead><tr><th scope="col">row</th>{head_row}</tr></thead><tbody>{cells}</tbody>'
        "</table></div></details></figure>"
    )


def says(surface: Surface, layer: int | None = None, head: int | None = None) -> str:
    """The figure in words, from a template: the highest patch, and the same of its controls."""
    own = highest(chosen(surface, layer, head), 1)[0]
    text = f"The highest patch is at {own}."
    parts = []
    for name in (SHUFFLED, RANDOM):
        if name in surface.controls:
            other = highest(_control(surface, name, layer, head), 1)[0]
            parts.append(f"with {CONTROLS[name].split(',')[0]} it is at {other}")
    if parts:
        text += f" {'; '.join(parts).capitalize()}."
    if FOLLOWED in surface.controls:
        here = correlation(chosen(surface, layer, head), _control(surface, SHUFFLED, layer, head))
        moved = correlation(chosen(surface, layer, head), _control(surface, FOLLOWED, layer, head))
        text += (
            f" Over the patches the figure correlates {moved:+.2f} with that of the shuffled image "
            f"when each patch is followed to its new place, {here:+.2f} place by place."
        )
    return text


def verdict(surface: Surface) -> str:
    """One sentence on the mean over all heads: whether a patch stands out, and what it follows.

    "No strong bias found" where the highest patch receives under twice the even share, or under 1.5
    times what the highest patch receives with random weights.
    """
    own = highest(surface.mean(), 1)[0]
    least = f"no patch receives {STRONG:g} times the even share"
    if own.value < STRONG:
        return f"No strong bias found: {least} (the highest is at {own})."
    if RANDOM in surface.controls:
        other = highest(surface.mean(control=RANDOM), 1)[0]
        if own.value < OVER * other.value:
            return (
                f"No strong bias found: the highest patch is at {own}, and with random weights "
                f"it is at {other}."
            )
    if SHUFFLED not in surface.controls:
        return f"A patch stands out at {own}; the controls were left out."
    place = correlation(surface.mean(), surface.mean(control=SHUFFLED))
    patch = correlation(surface.mean(), surface.mean(control=FOLLOWED))
    numbers = f"{patch:+.2f} patch by patch and {place:+.2f} place by place, once they are shuffled"
    if place >= ALIKE and place > patch:
        return f"A bias to a place in the image, strongest at {own} (correlation {numbers})."
    if patch >= ALIKE:
        return f"Attention follows what the patches show, most at {own} (correlation {numbers})."
    return f"A patch stands out at {own}, by neither place nor content alone ({numbers})."


def _control(surface: Surface, name: str, layer: int | None, head: int | None) -> Tensor:
    other = Surface(
        surface.key, surface.title, surface.meaning, surface.layers, surface.controls[name]
    )
    return chosen(other, layer, head)


def correlation(one: Tensor, other: Tensor) -> float:
    """Pearson correlation over the patches; NaN where one is constant."""
    both = torch.stack([one.flatten(), other.flatten()]).double()
    both = both - both.mean(-1, keepdim=True)
    return float((both[0] * both[1]).sum() / both.square().sum(-1).sqrt().prod())


def surface_of(seen: ImageSeen, key: str) -> Surface:
    for surface in seen.surfaces:
        if surface.key == key:
            return surface
    raise AttnbiasError(
        f"{key!r} was not seen of this image; there is {', '.join(s.key for s in seen.surfaces)}."
    )


def which(layer: int | None, head: int | None) -> str:
    if layer is None:
        return "mean of all layers and heads"
    return f"layer {layer}, mean of its heads" if head is None else f"layer {layer}, head {head}"


def described(title: str, most: list[Patch]) -> str:
    """What a reader who does not see the figure is told."""
    return f"{title}. Highest patches: {'; '.join(str(patch) for patch in most)}."


def steps(count: int) -> list[int]:
    """Which rows or columns carry a number: about seven of them, the first always."""
    step = max(1, -(-count // 7))
    return list(range(1, count + 1, step))


def words(text: str) -> str:
    """Text for HTML and SVG: escaped, invisible characters shown."""
    return html.escape(visible(text), quote=False)


def attribute(text: str) -> str:
    return html.escape(visible(text), quote=True)
