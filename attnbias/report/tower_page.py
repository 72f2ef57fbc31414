"""The page of an image: figures over it, a table for each statistic, no script and no request."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from attnbias.report import overlay
from attnbias.report.overlay import words
from attnbias.report.pixels import thumbnail
from attnbias.report.towers import (
    CONTROLS,
    CrossSeen,
    ImageSeen,
    ModalitySeen,
    Numbers,
    Surface,
    TowersSeen,
)

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)


def render(seen: TowersSeen) -> bytes:
    """The page in UTF-8; equal data give equal bytes. All text is taken for hostile and escaped."""
    body = "".join(
        f'<section aria-label="{overlay.attribute(heading(part))}">'
        f"<h2>{words(heading(part))}</h2>{''.join(_part(part))}</section>"
        for part in seen.parts
    )
    style = (Path(__file__).parent / "overlay.css").read_text("utf-8")
    made = "".join(f"<dt>{words(k)}</dt><dd>{words(v)}</dd>" for k, v in facts(seen))
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Attention of {words(seen.model)}</title><style>{style}</style>"
        f"</head><body><main><h1>Attention of {words(seen.model)}</h1>"
        f'<div class="box"><h3>In words</h3><ul>'
        f"{''.join(f'<li>{words(line)}</li>' for line in findings(seen))}</ul>"
        '<p class="soft">Attention says where a model looks, not why it answers as it does.</p>'
        f"</div>{body}<h2>How this was made</h2><dl>{made}</dl></main></body></html>\n"
    )
    return page.encode("utf-8", "replace")


def facts(seen: TowersSeen) -> list[tuple[str, str]]:
    """What identifies the page: model, weights, hash of each image, version."""
    pictures = {
        part.picture.sha256: part.picture for part in seen.parts if isinstance(part, ImageSeen)
    }
    return [
        ("Model", seen.model),
        ("Weights", seen.revision or "unknown"),
        ("Architecture", seen.architecture),
        *(
            (f"Image {one.name}".strip(), f"pixels as the model saw them, SHA-256 {digest}")
            for digest, one in pictures.items()
        ),
        ("attnbias", seen.version),
        *seen.settings,
    ]


def heading(part: ImageSeen | ModalitySeen | CrossSeen) -> str:
    if isinstance(part, ImageSeen):
        return f"Over the image ({part.tower} tower)"
    if isinstance(part, ModalitySeen):
        return "Shares of attention between image and text"
    return "From the decoder to what the encoder read"


def findings(seen: TowersSeen) -> list[str]:
    """One sentence for each surface and number, from templates, with the controls' numbers."""
    found = []
    for part in seen.parts:
        if isinstance(part, ImageSeen):
            found += [
                f"{one.title} ({part.tower} tower, mean of all layers and heads): "
                f"{overlay.verdict(one)} {overlay.says(one)}"
                for one in part.surfaces
            ]
        if isinstance(part, CrossSeen):
            found.append(f"Over the source, the mean of all layers and heads: {crossing(part)}")
        found += [in_words(one) for one in part.numbers]
    return found


def crossing(part: CrossSeen, count: int = 3) -> str:
    """The source positions that receive most, in words."""
    mean = part.received.flatten(0, 1).nanmean(0)
    best = mean.argsort(descending=True, stable=True)[:count].tolist()
    named = [f"“{part.source[n]}” (position {n}) {overlay.times(float(mean[n]))}" for n in best]
    return f"most goes to {', '.join(named)}, in times the even share."


def in_words(one: Numbers) -> str:
    """A statistic of the heads in words: mean, standard error over heads, even share, controls."""
    mean, error = spread(one.values)
    text = f"{one.title}: {value(mean, one.unit)} as the mean over heads (standard error "
    text += f"{value(error, one.unit)}), where even attention gives {value(one.even, one.unit)}"
    for name, control in one.controls.items():
        text += f"; {CONTROLS[name]}: {value(spread(control)[0], one.unit)}"
    return text + "."


def spread(values: Tensor) -> tuple[float, float]:
    """Mean over the heads and its standard error."""
    known = values[~values.isnan()].double()
    if len(known) < 2:
        return float(known.mean()), math.nan
    return float(known.mean()), float(known.std() / len(known) ** 0.5)


def value(number: float, unit: str) -> str:
    if math.isnan(number):
        return "not measured"
    return f"{number:.1%}" if unit.startswith("share") else f"{number:.3g} {unit}"


def _part(part: ImageSeen | ModalitySeen | CrossSeen) -> Iterator[str]:
    if isinstance(part, ImageSeen):
        for surface in part.surfaces:
            yield f"<h3>{words(surface.title)}</h3>"
            yield overlay.fragment(part, surface.key)
            yield from _layers(surface)
    if isinstance(part, CrossSeen):
        yield _source(part)
    yield "".join(_table(one) for one in part.numbers)


SHOWN = 200
"""Source positions listed on the page; of more, those that receive most."""


def _source(part: CrossSeen) -> str:
    """Every source position with what it receives, as a bar and a number."""
    mean = part.received.flatten(0, 1).nanmean(0)
    top = max(float(mean.max()), 1e-12)
    best = sorted(mean.argsort(descending=True, stable=True)[:SHOWN].tolist())
    lines = "".join(
        f'<tr><td>{n}</td><th scope="row">{words(part.source[n])}</th><td>{float(mean[n]):.2f}</td>'
        f'<td class="bar"><span style="width:{100 * float(mean[n]) / top:.1f}%"></span></td></tr>'
        for n in best
    )
    left = len(part.source) - len(best)
    more = f" The {left} positions that receive least are left out." if left else ""
    return (
        f"<p>{words(crossing(part).capitalize())}</p>"
        "<details open><summary>What each position of the source receives</summary>"
        '<div class="scroll"><table class="source"><caption>Attention received from '
        f"{len(part.target)} decoder tokens, the mean of all layers and heads, in times the even "
        f"share.{more}</caption><thead><tr><th>position</th><th>source</th><th>times</th><td></td>"
        f"</tr></thead><tbody>{lines}</tbody></table></div></details>"
    )


def _layers(surface: Surface) -> Iterator[str]:
    """The heads of each layer as small pictures of patches, their highest patch in words."""
    for row, layer in enumerate(surface.layers):
        top = float(surface.values[row].nan_to_num(0.0).max())
        heads = "".join(
            f'<figure><img alt="" src="{thumbnail(one, top)}"><figcaption>head {head}: '
            f"{words(str(overlay.highest(one, 1)[0]))}</figcaption></figure>"
            for head, one in enumerate(surface.values[row])
            if not bool(one.isnan().all())
        )
        mean = overlay.highest(surface.mean(layer), 1)[0]
        yield (
            f"<details><summary>Layer {layer}, every head (mean: highest at {words(str(mean))})"
            f'</summary><div class="heads">{heads}</div></details>'
        )


def _table(one: Numbers) -> str:
    heads = range(one.values.shape[1])
    lines = "".join(
        f'<tr><th scope="row">layer {layer}</th>'
        + "".join(f"<td>{_cell(float(one.values[row, head]), one.unit)}</td>" for head in heads)
        + "</tr>"
        for row, layer in enumerate(one.layers)
    )
    columns = "".join(f'<th scope="col">head {head}</th>' for head in heads)
    return (
        f"<details><summary>{words(one.title)}: every head</summary><p>{words(one.meaning)}</p>"
        f'<div class="scroll"><table><caption>{words(in_words(one))}</caption><thead><tr><td></td>'
        f"{columns}</tr></thead><tbody>{lines}</tbody></table></div></details>"
    )


def _cell(number: float, unit: str) -> str:
    if math.isnan(number):
        return ""
    return f"{100 * number:.1f}%" if unit.startswith("share") else f"{number:.3g}"


def rows(seen: TowersSeen) -> list[dict[str, Any]]:
    """Every number of the page: one row for each head, statistic and control, as CSV holds them."""
    found: list[dict[str, Any]] = []

    def add(tower: str, key: str, layers: tuple[int, ...], which: str, values: Tensor) -> None:
        for row, layer in enumerate(layers):
            for head, number in enumerate(values[row].tolist()):
                if not math.isnan(number):
                    found.append({
                        "tower": tower, "statistic": key, "of": which, "layer": layer,
                        "head": head, "value": number,
                    })  # fmt: skip

    for part in seen.parts:
        if isinstance(part, CrossSeen):
            top = part.received.nan_to_num(-1).amax(-1)
            add(part.tower, "received highest position", part.layers, "this input", top)
        for one in part.numbers:
            for which, values in {"this input": one.values, **one.controls}.items():
                add(part.tower, one.key, one.layers, which, values)
        if isinstance(part, ImageSeen):
            for surface in part.surfaces:
                for which, values in {"this input": surface.values, **surface.controls}.items():
                    flat = values.flatten(0, 1).flatten(1)
                    best = flat.nan_to_num(-1).amax(-1).reshape(values.shape[:2])
                    key = f"{surface.key} highest patch"
                    add(part.tower, key, surface.layers, which, best)
    return found


def to_csv(seen: TowersSeen) -> bytes:
    """tower, statistic, of ("this input" or a control), layer, head, value; a line for each."""
    import csv
    import io

    out = io.StringIO(newline="")
    names = ("tower", "statistic", "of", "layer", "head", "value")
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "value": repr(row["value"])} for row in rows(seen))
    return out.getvalue().encode()


def to_json(seen: TowersSeen) -> bytes:
    """The same rows, every surface patch by patch, and what identifies the page."""
    surfaces = [
        {
            "tower": part.tower, "statistic": one.key, "layers": list(one.layers),
            "values": _plain(one.values),
            "controls": {name: _plain(values) for name, values in one.controls.items()},
        }
        for part in seen.parts if isinstance(part, ImageSeen) for one in part.surfaces
    ]  # fmt: skip
    sources = [
        {"tower": part.tower, "source": part.source, "layers": list(part.layers),
         "received": _plain(part.received)}
        for part in seen.parts if isinstance(part, CrossSeen)
    ]  # fmt: skip
    whole = {
        "facts": dict(facts(seen)), "heads": rows(seen), "surfaces": surfaces, "sources": sources,
    }  # fmt: skip
    return (json.dumps(whole, indent=1, allow_nan=False) + "\n").encode()


def _plain(values: Tensor) -> Any:
    found = values.tolist()

    def walk(one: Any) -> Any:
        if isinstance(one, list):
            return [walk(part) for part in one]
        return one if math.isfinite(one) else None

    return walk(found)
