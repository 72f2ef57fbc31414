"""The picture and the prices of DaViT, ViTDet and the brain encoder in `docs/models/vision.md`.

python docs/make_vision_more.py

Both are made from what `experiments/results/models` holds of their grids.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs as a script from anywhere

from torch import nn  # noqa: E402

from attnbias_models.vision.brain import BrainEncoder  # noqa: E402
from attnbias_models.vision.davit import DaViT  # noqa: E402
from attnbias_models.vision.simulated import moving_voxels  # noqa: E402
from attnbias_models.vision.vitdet import ViTDet  # noqa: E402
from benchmarks.common import markdown_table, save_figure, write_text  # noqa: E402
from experiments.grid import Grid  # noqa: E402
from experiments.models import brain_encoder, davit, vitdet  # noqa: E402

PAGE = ROOT / "docs" / "models" / "vision.md"
PICTURE = ROOT / "docs" / "images" / "models" / "vision_more.png"
PRICES = re.compile(r"(<!-- prices: vision_more -->\n).*?(<!-- end of prices -->)", flags=re.DOTALL)
BLUE, GREY, RULE = "#1f4e8c", "#9a9a9a", "#c26a00"


def recorded(grid: Grid) -> Mapping[str, Any]:
    """What a grid's file holds, or nothing."""
    found: Mapping[str, Any] = {}
    if grid.path.exists():
        found = json.loads(grid.path.read_text(encoding="utf-8"))
    return found


def values(result: Mapping[str, Any], variant: str, number: str) -> list[float]:
    """A number by seed: with the setting that was taken, or of the best cell while it is not."""
    cells = [cell for cell in result.get("cells", ()) if cell["variant"] == variant]
    if not cells:
        return []
    taken = result["means"][variant]["setting"]
    if taken:
        cells = [cell for cell in cells if cell["setting"] == taken]
    else:
        cells = [min(cells, key=lambda cell: cell["numbers"]["validation"])]
    return [cell["numbers"][number] for cell in cells if number in cell["numbers"]]


def panel(
    axes: Any,
    grid: Grid,
    number: str,
    title: str,
    *,
    line: tuple[float, str],
    scale: float = 1.0,
    variants: Sequence[str] = (),
) -> None:
    """A point for each seed and a bar at their mean; a line for what chance or noise allow."""
    result = recorded(grid)
    shown = variants or grid.variants
    for place, variant in enumerate(shown):
        found = [scale * value for value in values(result, variant, number)]
        if found:
            colour = BLUE if place == 0 else GREY
            axes.bar(place, sum(found) / len(found), width=0.7, color=colour, alpha=0.35)
            axes.plot([place] * len(found), found, "o", color=colour, markersize=4)
    axes.set_xlim(-0.6, len(shown) - 0.4)
    axes.set_xticks(range(len(shown)), list(shown), fontsize="small")
    axes.set_title(title, fontsize="small")
    if line[1]:
        axes.axhline(line[0], color=RULE, linestyle=":")
        axes.annotate(line[1], (0.98, line[0]), xycoords=("axes fraction", "data"), ha="right",
                      va="bottom", color=RULE, fontsize="small")  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)


def picture() -> Any:
    """Three panels, one for each grid."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    one, two, three = figure.subplots(1, 3)
    title = "DaViT: test errors on digits, %"
    panel(one, davit.GRIDS[0], "error", title, line=(0.0, ""), scale=100)
    title = "ViTDet: far corners named rightly"
    panel(two, vitdet.GRIDS[0], "right", title, line=(0.25, "guessing"))
    title = "Brain encoder: R² on images kept apart"
    limit = (0.8, "what the noise leaves")
    kinds = brain_encoder.VARIANTS
    panel(three, brain_encoder.GRIDS[0], "r2", title, line=limit, variants=kinds)
    two.set_ylim(0, 1.08)
    three.set_ylim(-0.25, 1)
    three.axhline(0, color="black", linewidth=0.8)
    return figure


def prices() -> str:
    """Weights and seconds of the trainings of the grids, as Markdown."""
    data, _ = moving_voxels(1)
    made: dict[str, list[nn.Module]] = {
        "davit": [DaViT(davit.small(kinds)) for kinds in davit.KINDS.values()],
        "vitdet": [ViTDet(vitdet.small(variant)) for variant in vitdet.VARIANTS],
        "brain_encoder": [
            BrainEncoder(brain_encoder.small(route, data)) for route in brain_encoder.VARIANTS[:3]
        ],
    }
    steps = {
        "davit": "300 steps of 32 digits",
        "vitdet": "240 steps of 32 images of 64 patches",
        "brain_encoder": "500 steps of 64 feature maps of 64 places",
    }
    rows, cpus = [], set()
    for grid in (davit.GRIDS[0], vitdet.GRIDS[0], brain_encoder.GRIDS[0]):
        result = recorded(grid)
        for variant, model in zip(grid.variants, made[grid.name], strict=False):
            cells = [c["seconds"] for c in result.get("cells", ()) if c["variant"] == variant]
            took = f"{median(cells):.0f} ({len(cells)})" if cells else "not measured"
            weights = sum(weight.numel() for weight in model.parameters())
            rows.append((f"{grid.name}, {variant}", steps[grid.name], f"{weights:,}", took))
        if result:
            cpus.add(result["environment"]["machine"]["cpu"])
    columns = ("model", "trained for", "weights", "seconds (median of)")
    table = markdown_table(columns, rows)
    return f"{table}\n\nOne thread, {', '.join(sorted(cpus))}, with measuring included."


def main() -> None:
    """Write the picture and the page's prices."""
    save_figure(picture(), PICTURE)
    text = PAGE.read_text(encoding="utf-8")
    made = PRICES.sub(lambda block: f"{block[1]}\n{prices()}\n\n{block[2]}", text)
    write_text(PAGE, made)
    for path in (PICTURE, PAGE):
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
