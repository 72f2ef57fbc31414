"""Importance by pruning one head at a time, held against pruning several at once."""

from __future__ import annotations

import attnbias as ab
from experiments._vision import classifier, digits
from experiments.common import Experiment

PRUNED, ROWS = 3, 200


def measure(seed: int, metric: str = "probability") -> dict[str, float]:
    model = classifier(seed)
    train, test = digits(seed)
    importance = ab.measures.PruningImportance(metric=metric)
    known = [{"pixel_values": train.images[:ROWS], "labels": train.labels[:ROWS]}]
    fresh = [{"pixel_values": test.images, "labels": test.labels}]
    scores = importance.measure(model, known)
    whole = importance.pruned(model, fresh, ())
    top = scores.top(PRUNED)
    others = [scores.others(top, draw) for draw in range(3)]
    lost = [whole - importance.pruned(model, fresh, heads) for heads in others]
    least = tuple(scores.ranked()[-PRUNED:])
    return {
        "effect": whole - importance.pruned(model, fresh, top),
        "control": sum(lost) / len(lost),
        "least important": whole - importance.pruned(model, fresh, least),
        "plain accuracy": whole,
    }


EXPERIMENT = Experiment(
    work="vit-visual-analytics",
    claim="The heads of a digits classifier whose pruning alone lowers the probability of the true "
    "class most on training images cost most accuracy on test images when three are pruned "
    "together.",
    control="three other heads, the mean of three draws",
    measure=measure,
)
