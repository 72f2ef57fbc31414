"""The picture and the prices of `docs/models/music.md`.

python docs/make_music.py

Made from `experiments/results/models/music_*.json` and `benchmarks/results/music.json`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs as a script from anywhere

from benchmarks.common import save_figure, write_text  # noqa: E402
from benchmarks.music import table  # noqa: E402

RESULTS = ROOT / "experiments" / "results" / "models"
PRICES = ROOT / "benchmarks" / "results" / "music.json"
PAGE = ROOT / "docs" / "models" / "music.md"
PICTURE = ROOT / "docs" / "images" / "models" / "music.png"
BEGIN, END = "<!-- prices: music -->\n", "<!-- end of prices -->"
COLOURS = {
    "relative": "#1f4e8c",
    "both": "#5b9bd5",
    "sinusoid": "#c26a00",
    "learned": "#8c5a9e",
    "none": "#8a8a8a",
    "skewed": "#c26a00",
    "gathered": "#8a8a8a",
}
LABELS = {
    "both": "relative and sinusoids",
    "sinusoid": "sinusoids",
    "learned": "learned places",
    "none": "no positions",
    "skewed": "the paper's skewing",
    "gathered": "a vector a pair",
}


def read(name: str) -> Mapping[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def by_place(panel: Any, means: Mapping[str, Any], length: int) -> None:
    """Nats a token over the places of a passage; a line ends where training did."""
    names: list[str] = []
    for variant, found in means.items():
        names = sorted(name for name in found if name.startswith("nats_at_"))
        if not names:
            continue
        wide = 4 * length / len(names)
        places = [(number + 0.5) * wide for number in range(len(names))]
        rows = [found[name] for name in names]
        panel.errorbar(
            places,
            [row["mean"] for row in rows],
            [(row["high"] or row["mean"]) - row["mean"] for row in rows],
            color=COLOURS[variant],
            label=LABELS.get(variant, variant),
            marker="o",
            ms=4,
            lw=1.4,
            capsize=3,
        )
    panel.axvline(length, color="black", lw=0.8, ls=":")
    panel.set_xlabel("place (dotted: the length trained on)", fontsize=8)
    panel.set_ylabel("nats a token")


def made(panel: Any, means: Mapping[str, Any]) -> None:
    """Wrong notes of the follower in canons that were made."""
    there = {name: found for name, found in means.items() if "wrong_beyond" in found}
    for shift, part, alpha in ((-0.2, "wrong_within", 0.45), (0.2, "wrong_beyond", 1.0)):
        rows = [found[part] for found in there.values()]
        panel.bar(
            [place + shift for place in range(len(rows))],
            [100 * row["mean"] for row in rows],
            0.38,
            yerr=[100 * ((row["high"] or row["mean"]) - row["mean"]) for row in rows],
            color=[COLOURS[name] for name in there],
            alpha=alpha,
            capsize=3,
        )
    panel.set_xticks(
        range(len(there)), [LABELS.get(n, n).replace(" ", "\n") for n in there], fontsize=7
    )
    panel.set_ylabel("% of the follower's notes")
    panel.set_ylim(0, 105)


def memory(panel: Any, means: Mapping[str, Any]) -> None:
    """Bytes of one layer's attention by length."""
    for variant, found in means.items():
        names = sorted(name for name in found if name.startswith("bytes_"))
        panel.plot(
            [int(name.removeprefix("bytes_")) for name in names],
            [found[name]["mean"] / 1e6 for name in names],
            color=COLOURS[variant],
            label="ours" if variant == "relative" else LABELS[variant],
            marker="o",
            ms=4,
        )
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks([256, 512, 1024], ["256", "512", "1,024"])
    panel.set_xlabel("tokens")
    panel.set_ylabel("MB held at most")


def picture(results: Mapping[str, Mapping[str, Any]], path: Path = PICTURE) -> None:
    """What is recorded, a panel each; a grid that has no means yet has none."""
    from matplotlib.figure import Figure

    means = {
        name: {v: found for v, found in result["means"].items() if found["seeds"]}
        for name, result in results.items()
    }
    wanted: list[tuple[str, str, Callable[[Any, Mapping[str, Any]], None]]] = [
        ("music_chorales", "Chorales kept apart", lambda p, m: by_place(p, m, 128)),
        ("music_canons", "Canons made by rule", lambda p, m: by_place(p, m, 64)),
        ("music_canons", "Wrong notes in canons it makes\n(pale: in the trained length)", made),
        ("music_memory", "Attention, forward and backward", memory),
    ]
    wanted = [row for row in wanted if means[row[0]]]
    figure = Figure(figsize=(3.2 * len(wanted), 3.7), layout="constrained")
    panels = figure.subplots(1, len(wanted), squeeze=False)[0]
    for panel, (name, title, draw) in zip(panels, wanted, strict=True):
        draw(panel, means[name])
        panel.set_title(title, fontsize=9, loc="left")
        panel.grid(alpha=0.25)
        if draw is memory:
            panel.legend(fontsize=7, frameon=False)
    lines = panels[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower left", ncols=len(lines[1]), fontsize=8, frameon=False)
    save_figure(figure, path)


def prices() -> str:
    """The table of the benchmark, and where it ran."""
    if not PRICES.exists():
        return "Not measured yet."
    found = json.loads(PRICES.read_text(encoding="utf-8"))
    where = f"`{found['command']}`, one thread of {found['machine']['cpu']}."
    return f"{table(found['rows'])}\n\n{where}"


def main() -> int:
    picture({name: read(name) for name in ("music_chorales", "music_canons", "music_memory")})
    text = PAGE.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{PAGE.name} has no place for the prices")
    write_text(PAGE, f"{head}{BEGIN}\n{prices()}\n\n{END}{tail}")
    print(PICTURE.relative_to(ROOT), PAGE.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
