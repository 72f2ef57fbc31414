"""`python -m experiments.models._bsa_tnp_picture`: the likelihoods of the grids of BSA-TNP."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.common import IMAGES, save_figure
from experiments.models.bsa_tnp import GRIDS

TITLES = {
    "bsa_tnp_line": "Gaussian processes on a line",
    "bsa_tnp_plane": "Gaussian processes on a plane",
    "bsa_tnp_epidemics": "Epidemics in space and time",
    "bsa_tnp_sphere": "Gaussian processes on a sphere",
}
WHERE = {
    "nll": "where trained",
    "nll_shifted": "shifted",
    "nll_scaled": "doubled",
    "nll_turned": "turned",
}
COLOURS = ("#4477aa", "#ee6677", "#ccbb44", "#aa3377")
CONTROL = "#888888"  # told coordinates in place of a bias


def draw() -> Any:
    """Bars of the mean negative log-likelihood with their 95 % intervals; less is better."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10.5, 6.6), layout="constrained")
    for place, grid in zip(axes.flat, GRIDS, strict=True):
        place.set_title(TITLES[grid.name], fontsize=10)
        found = json.loads(grid.path.read_text(encoding="utf-8")) if grid.path.exists() else {}
        _bars(place, found.get("means", {}))
        place.set_ylabel("negative log-likelihood")
        place.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Less is better; bars: mean of the seeds, lines: 95 % intervals", fontsize=10)
    return figure


def _bars(place: Any, means: dict[str, Any]) -> None:
    numbers = [n for n in WHERE if any(n in row for row in means.values())]
    count = max(1, len(means))
    for which, (variant, row) in enumerate(means.items()):
        for at, name in enumerate(numbers):
            if name not in row or row[name]["mean"] is None:
                continue
            mean, low = row[name]["mean"], row[name]["low"]
            error = None if low is None else mean - low
            label = variant if at == 0 else None
            x = at + (which - (count - 1) / 2) * 0.8 / count
            colour = CONTROL if variant == "coordinates" else COLOURS[which % len(COLOURS)]
            place.bar(x, mean, 0.75 / count, yerr=error, color=colour, label=label, capsize=2)
    exact = [
        row["nll"]["mean"] - row["above_exact"]["mean"]
        for row in means.values()
        if "above_exact" in row and row["nll"]["mean"] is not None
    ]
    if exact:
        place.axhline(exact[0], color="black", lw=1, ls=":", label="exact posterior, where trained")
    place.axhline(0, color="black", lw=0.5)
    place.set_xticks(range(len(numbers)), [WHERE[name] for name in numbers])
    if means and numbers:
        low, high = place.get_ylim()
        place.set_ylim(low, high + 0.25 * (high - low))  # room for the names
        place.legend(fontsize=7, frameon=False, ncols=2)


if __name__ == "__main__":
    path = IMAGES / "models" / "bsa_tnp_likelihoods.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(draw(), path)
    print(f"wrote {path}")
