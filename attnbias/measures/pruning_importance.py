"""How important a head of a classifier is, by what happens without it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.measures.base import Data, HeadMeasure, bar, evaluating, forwards
from attnbias.measures.scores import Head, Scores
from attnbias.measures.seeing import tower_of

METRICS = ("probability", "loss", "divergence", "accuracy")


@dataclass(frozen=True)
class PruningImportance(HeadMeasure):
    r"""Importance of heads by pruning: what an image's prediction loses with one head's output 0.

    .. math:: s_h = \ell(f) - \ell(f_{\setminus h})

    with :math:`\ell` the probability of the true class ("probability"), minus its cross-entropy in
    nats ("loss"), or whether it is the largest ("accuracy"); "divergence" is the Jensen-Shannon
    divergence (nats) between the class probabilities with and without the head, which needs no
    label. Higher is more important. `details` hold all four, ``(images, layers, heads)``.

    Args:
        metric: which of the four are the scores.
        keep: prune the other heads of the layer instead and see what this one saves: the same
            difference, with all heads of its layer pruned as the start.

    `data` are forwards of a classifier with ``labels (batch)``; `pruned` gives the accuracy with
    any set of heads pruned (a pruning curve).

    Cost: one forward for each head and batch.

    Raises:
        AttnbiasError: no data, no labels, logits that are not ``(batch, classes)``.

    Source: after How Does Attention Work in Vision Transformers? A Visual Analytics Attempt (2023,
    arXiv 2303.13731), abstract only ("multiple pruning-based metrics"): which metrics, and keeping
    one as the opposite of pruning one, are chosen here.
    """

    name: ClassVar[str] = "pruning_importance"
    metric: str = "probability"
    keep: bool = False

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise AttnbiasError(
                f"PruningImportance(metric) is one of {', '.join(METRICS)}, got {self.metric!r}."
            )

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> Scores:
        """A score for each image and head; see `Measure.measure`."""
        given = forwards(data, "PruningImportance")
        tower = tower_of(model, "PruningImportance", None, "vision")
        heads = _heads(model, tower, given[0])
        layers = tuple(dict.fromkeys(layer for layer, _ in heads))
        width = max(head for _, head in heads) + 1
        parts: dict[str, list[Tensor]] = {name: [] for name in METRICS}
        steps = len(given) * (len(heads) + (len(layers) if self.keep else 0))
        with evaluating(model), torch.no_grad(), bar(steps, "pruning", progress) as tick:
            for inputs in given:
                labels = _labels(inputs)
                whole = _probabilities(model, inputs, (), tower)
                bare = {}
                if self.keep:
                    for layer in layers:
                        all_of = tuple(h for h in heads if h[0] == layer)
                        bare[layer] = _probabilities(model, inputs, all_of, tower)
                        tick()
                found = {
                    name: whole.new_full((len(labels), len(layers), width), torch.nan)
                    for name in METRICS
                }
                for layer, head in heads:
                    cut = tuple(h for h in heads if h[0] == layer and h[1] != head)
                    other = _probabilities(
                        model, inputs, cut if self.keep else ((layer, head),), tower
                    )
                    before, after = (other, bare[layer]) if self.keep else (whole, other)
                    for name, values in differences(before, after, labels).items():
                        found[name][:, layers.index(layer), head] = values
                    tick()
                for name in METRICS:
                    parts[name].append(found[name])
        details = {name: torch.cat(values) for name, values in parts.items()}
        return Scores(self.name, tower, layers, details[self.metric], details=details)

    def pruned(self, model: nn.Module, data: Data | None, heads: tuple[Head, ...]) -> float:
        """The accuracy of the model with these heads' outputs zero."""
        given = forwards(data, "PruningImportance")
        tower = tower_of(model, "PruningImportance", None, "vision")
        right = []
        with evaluating(model), torch.no_grad():
            for inputs in given:
                found = _probabilities(model, inputs, tuple(heads), tower).argmax(-1)
                right.append(found == _labels(inputs))
        return float(torch.cat(right).double().mean())


def differences(before: Tensor, after: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The four metrics of class probabilities ``(batch, classes)`` without and with a pruning."""
    row = torch.arange(len(labels), device=labels.device)
    tiny = torch.finfo(before.dtype).tiny
    middle = (before + after) / 2

    def apart(p: Tensor) -> Tensor:
        return (torch.xlogy(p, p) - torch.xlogy(p, middle)).sum(-1)

    own, other = before[row, labels], after[row, labels]
    return {
        "probability": own - other,
        "loss": own.clamp_min(tiny).log() - other.clamp_min(tiny).log(),
        "divergence": (apart(before) + apart(after)) / 2,
        "accuracy": (before.argmax(-1) == labels).to(before)
        - (after.argmax(-1) == labels).to(before),
    }


def _heads(model: nn.Module, tower: str, inputs: Mapping[str, Any]) -> list[Head]:
    """All heads of a tower, as a first forward shows them."""
    from attnbias.measures.seeing import looked
    from attnbias.observe import statistics

    given = {name: value for name, value in inputs.items() if name != "labels"}
    with evaluating(model), torch.no_grad():
        seen = looked(model, given, [statistics.FirstToken()], tower)
    return [(row.layer, row.head) for row in seen.table()]


def _labels(inputs: Mapping[str, Any]) -> Tensor:
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim != 1:
        raise AttnbiasError("PruningImportance needs data with labels (batch), class numbers.")
    return labels


def _probabilities(
    model: nn.Module, inputs: Mapping[str, Any], heads: tuple[Head, ...], tower: str
) -> Tensor:
    """(batch, classes) float64, with the outputs of some heads zero."""
    from contextlib import nullcontext

    from attnbias.steer import steer
    from attnbias.steer.rules import BlockHeads

    given = {name: value for name, value in inputs.items() if name != "labels"}
    rule = BlockHeads(heads=heads, towers=(tower,)) if heads else None
    with nullcontext() if rule is None else steer(model, rule):
        logits = model(**given).logits
    if logits.ndim != 2:
        raise AttnbiasError(
            f"PruningImportance needs logits (batch, classes), got shape {tuple(logits.shape)}."
        )
    found: Tensor = logits.double().softmax(-1)
    return found
