"""How much a model's loss hangs on each head: by the gradient of a gate, and by leaving it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.measures.base import Data, HeadMeasure, bar, evaluating, forwards
from attnbias.measures.losses import Loss, row_loss, tower_sites
from attnbias.measures.scores import Head, Scores, gather
from attnbias.steer.context import steer
from attnbias.steer.rule import Heads, Rule
from attnbias.steer.rules.block_heads import BlockHeads
from attnbias.steer.site import SiteCall


@dataclass(frozen=True, kw_only=True)
class _Gates(Rule):
    """Multiplies each head's output by a gate that is 1 and asks for its gradient."""

    heads: Heads = "all"
    gates: dict[int, Tensor] = field(default_factory=dict)

    def outputs(self, site: SiteCall, out: Tensor) -> Tensor | None:
        layer = site.site.layer
        if layer not in self.gates:
            kind = torch.float64 if out.dtype == torch.float64 else torch.float32
            shape, device = out.shape[:2], out.device
            self.gates[layer] = torch.ones(shape, dtype=kind, device=device, requires_grad=True)
        return out * self.gates[layer][..., None, None].to(out.dtype)


@dataclass(frozen=True)
class HeadImportance(HeadMeasure):
    r"""Importance of every head: how strongly the loss would move with a gate on its output.

    .. math:: I_h = \mathbb{E}_x \left| \frac{\partial L(x)}{\partial \xi_h} \right|_{\xi = 1}
              = \mathbb{E}_x \left| \mathrm{Att}_h(x)^\top
                \frac{\partial L(x)}{\partial \mathrm{Att}_h(x)} \right|

    where the head's output enters the output projection as :math:`\xi_h \mathrm{Att}_h(x)`. One
    sample is one row of the batch, whose gates are its own.

    Args:
        normalise: divide the scores of a layer by the l2 norm of the layer's means (the default of
            the paper; in the authors' scripts a flag that is off unless it is given). A layer whose
            scores are all zero stays zero.
        loss: ``loss(outputs, inputs)`` giving one number a row; by default the model's own
            cross-entropy, see `attnbias.measures.losses.row_loss`.
        tower: which one; by default "text", or the only one.

    Returns:
        `Scores`; ``scores.ranked()[::-1]`` is the order in which `HeadPruning` takes heads out.

    Cost: one forward and one backward a batch; no map is built.

    Raises:
        AttnbiasError: no data, no loss, no such tower.

    Source: Are Sixteen Heads Really Better than One? (2019, arXiv 1905.10650), section 4.1;
    equations read. The expectation over rows of the batch follows the equation.
    """

    name: ClassVar[str] = "head_importance"
    normalise: bool = True
    loss: Loss | None = None
    tower: str | None = None

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> Scores:
        given, where = forwards(data, type(self).__name__), tower_sites(model, self.tower)
        tower, layers, parts = where[0].tower, [site.layer for site in where], []
        with evaluating(model), bar(len(given), "head importance", progress) as tick:
            for inputs in given:
                gates = _Gates(towers=(tower,))
                with torch.enable_grad(), steer(model, gates):
                    total = row_loss(model, model(**inputs), inputs, self.loss).sum()
                reached = [gates.gates[layer] for layer in layers]
                slopes = torch.autograd.grad(total, reached, allow_unused=True)
                parts.append(
                    gather_layers(
                        [
                            torch.zeros_like(gate) if slope is None else slope.detach().abs()
                            for gate, slope in zip(reached, slopes, strict=True)
                        ]
                    )
                )
                tick()
        samples = gather(parts)
        if self.normalise:
            size = samples.nanmean(0).nan_to_num(0.0).norm(dim=-1)[None, :, None]
            samples = torch.where(size > 0, samples / size, samples)
        return Scores(self.name, tower, tuple(layers), samples)


@dataclass(frozen=True)
class HeadAblation(HeadMeasure):
    r"""What the loss gains when a head is left out, or when it is the only one left of its layer.

    .. math:: \Delta_h = L(\xi_h = 0) - L, \qquad
              \Delta_h = L(\xi_{h'} = 0 \text{ for all } h' \ne h \text{ of the layer}) - L

    One sample is one row of the batch.

    Args:
        mode: "one" leaves a head out (the paper's table 1), "all but one" every other head of its
            layer (tables 2 and 3).
        loss, tower: as in `HeadImportance`.

    Cost: one forward a head and batch, and one plain forward. A layer of one head has no value with
    "all but one": 0.

    Raises:
        AttnbiasError: no data, no loss, no such tower or mode.

    Source: Are Sixteen Heads Really Better than One? (2019, arXiv 1905.10650), section 3; equations
    read. The paper reports BLEU and accuracy; a `loss` that is minus such a score gives the same.
    """

    name: ClassVar[str] = "head_ablation"
    mode: Literal["one", "all but one"] = "one"
    loss: Loss | None = None
    tower: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("one", "all but one"):
            raise AttnbiasError(f"mode must be 'one' or 'all but one', got {self.mode!r}.")

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> Scores:
        given, where = forwards(data, type(self).__name__), tower_sites(model, self.tower)
        tower, layers = where[0].tower, [site.layer for site in where]
        heads = head_counts(model, tower, given[0])
        total = len(given) * sum(heads.values())
        parts = []
        with evaluating(model), torch.no_grad(), bar(total, "heads left out", progress) as tick:
            for inputs in given:
                plain = row_loss(model, model(**inputs), inputs, self.loss)
                columns = []
                for layer in layers:
                    found = []
                    for head in range(heads[layer]):
                        others = tuple((layer, h) for h in range(heads[layer]) if h != head)
                        out = ((layer, head),) if self.mode == "one" else others
                        found.append(loss_without(model, inputs, out, tower, self.loss) - plain)
                        tick()
                    columns.append(torch.stack(found, -1))
                parts.append(gather_layers(columns))
        return Scores(self.name, tower, tuple(layers), gather(parts))


def loss_without(
    model: nn.Module,
    inputs: Mapping[str, Any],
    heads: tuple[Head, ...],
    tower: str,
    loss: Loss | None,
) -> Tensor:
    """``(batch,)``: the loss of every row with the outputs of some heads zero."""
    if not heads:
        return row_loss(model, model(**inputs), inputs, loss)
    with steer(model, BlockHeads(heads=heads, towers=(tower,))):
        outputs = model(**inputs)
    return row_loss(model, outputs, inputs, loss)


@dataclass(frozen=True, kw_only=True)
class _Counter(Rule):
    """Notes how many heads each layer has."""

    heads: Heads = "all"
    found: dict[int, int] = field(default_factory=dict)

    def look(self, site: SiteCall) -> None:
        self.found[site.site.layer] = len(site.heads)


def head_counts(model: nn.Module, tower: str, inputs: Mapping[str, Any]) -> dict[int, int]:
    """Layer -> number of (query) heads, from one forward."""
    counter = _Counter(towers=(tower,))
    with evaluating(model), torch.no_grad(), steer(model, counter):
        model(**inputs)
    return counter.found


def gather_layers(columns: list[Tensor]) -> Tensor:
    """``(batch, layers, heads)`` of one ``(batch, heads)`` for each layer, NaN-padded in heads."""
    most = max(column.shape[-1] for column in columns)
    padded = [
        nn.functional.pad(c.detach().double().cpu(), (0, most - c.shape[-1]), value=torch.nan)
        for c in columns
    ]
    return torch.stack(padded, 1)
