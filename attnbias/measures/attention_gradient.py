"""How much a loss would move with the attention that chosen tokens get."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.measures.base import Data, HeadMeasure, bar, evaluating, forwards
from attnbias.measures.head_importance import gather_layers
from attnbias.measures.losses import Loss, row_loss, tower_sites
from attnbias.measures.scores import Scores, gather
from attnbias.steer.context import steer
from attnbias.steer.rule import Heads, Rule
from attnbias.steer.site import SiteCall

BLOCK = 256  # queries whose scores are looked at together


@dataclass(frozen=True, kw_only=True)
class _Probe(Rule):
    """Adds a zero to the head outputs that takes their gradient, and keeps the chosen values."""

    heads: Heads = "all"
    chosen: Tensor  # (batch, keys) booleans
    # By layer: the zero, the values (batch, heads, chosen, size), the weight of each entry.
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def outputs(self, site: SiteCall, out: Tensor) -> Tensor | None:
        probe = torch.zeros_like(out).requires_grad_()
        if site.shape[3] != self.chosen.shape[1]:
            raise AttnbiasError(
                f"{site.site} has {site.shape[3]} keys and input_ids {self.chosen.shape[1]}: the "
                "chosen tokens cannot be found among its keys."
            )
        keys = self.chosen.any(0).nonzero()[:, 0]
        pick = self.chosen[:, None, None, keys] & (site.key_positions[:, None, None, keys] >= 0)
        with torch.no_grad():
            seen = [
                site.scores(slice(n, min(n + BLOCK, out.shape[2])))[..., keys] > -torch.inf
                for n in range(0, out.shape[2], BLOCK)
            ]
            real = (site.query_positions >= 0)[:, None, :, None]
            self.found[site.site.layer] = (
                probe,
                site.value[:, :, keys].detach(),
                (torch.cat(seen, 2) & pick & real) / real.sum((1, 2, 3), keepdim=True),
            )
        return out + probe


@dataclass(frozen=True)
class AttentionGradient(HeadMeasure):
    r"""How strongly the loss depends on each head's attention to chosen tokens.

    .. math:: G_h = \frac{1}{n} \sum_{i} \sum_{j \in C}
              \left| \frac{\partial L}{\partial p^h_{ij}} \right|, \qquad
              \frac{\partial L}{\partial p_{ij}} =
              \Big\langle \frac{\partial L}{\partial o_i},\, v_j \Big\rangle

    over the n real queries of a row and the chosen keys C that each may see. Small values where the
    attention is large say that attending there is how a head does nothing. One sample is one row.

    Args:
        tokens: ids whose places in ``input_ids`` are C, as ``(tokenizer.sep_token_id,)``; None
            chooses every token.
        loss: ``loss(outputs, inputs)`` giving one number a row; by default the model's own
            cross-entropy, see `attnbias.measures.losses.row_loss`.
        tower: which one; by default "text", or the only one.

    Returns:
        `Scores`.

    Cost: one forward and backward a batch, and the scores of each layer once more in blocks of
    queries, for what the chosen keys are hidden from; no map is kept.

    Raises:
        AttnbiasError: no data, no loss, no ``input_ids``.

    Source: What Does BERT Look At? An Analysis of BERT's Attention (2019, arXiv 1906.04341),
    section 3.3; equations read. The paper has the masked language modelling loss and means over
    its corpus; the sum over the chosen keys of a query is chosen here.
    """

    name: ClassVar[str] = "attention_gradient"
    tokens: tuple[int, ...] | None = None
    loss: Loss | None = None
    tower: str | None = None

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> Scores:
        given, where = forwards(data, "AttentionGradient"), tower_sites(model, self.tower)
        tower, layers = where[0].tower, [site.layer for site in where]
        parts = []
        with evaluating(model), bar(len(given), "gradients of attention", progress) as tick:
            for inputs in given:
                probe = _Probe(towers=(tower,), chosen=self._chosen(inputs))
                with torch.enable_grad(), steer(model, probe):
                    total = row_loss(model, model(**inputs), inputs, self.loss).sum()
                parts.append(gather_layers(_slopes(total, [probe.found[n] for n in layers])))
                tick()
        return Scores(self.name, tower, tuple(layers), gather(parts))

    def _chosen(self, inputs: Any) -> Tensor:
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor):
            raise AttnbiasError("AttentionGradient finds its tokens in input_ids; give them.")
        if self.tokens is None:
            return torch.ones_like(ids, dtype=torch.bool)
        return torch.isin(ids, torch.tensor(self.tokens, device=ids.device))


def _slopes(total: Tensor, kept: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    """``(batch, heads)`` of each layer."""
    slopes = torch.autograd.grad(total, [probe for probe, _, _ in kept], allow_unused=True)
    found = []
    for slope, (probe, value, weight) in zip(slopes, kept, strict=True):
        slope = torch.zeros_like(probe) if slope is None else slope
        each = (slope.double() @ value.double().mT).abs() * weight
        found.append(each.sum((2, 3)))
    return found
