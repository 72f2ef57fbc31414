"""Whether a direction of the residual stream decides how much heads look at an entity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.measures.base import Data, HeadMeasure, bar, evaluating, forwards
from attnbias.measures.losses import tower_sites
from attnbias.measures.scores import Scores, gather
from attnbias.observe.observer import observe
from attnbias.observe.statistics import At
from attnbias.steer.context import steer
from attnbias.steer.hidden import HiddenCall
from attnbias.steer.rule import Heads, Rule


@dataclass(frozen=True, kw_only=True)
class _Push(Rule):
    """Adds a vector to the residual stream after a layer, at one token of each row."""

    heads: Heads = "all"
    vector: Tensor
    at: Tensor  # (batch,)

    hidden_at: ClassVar[tuple[str, ...]] = ("layer",)

    def hidden(self, site: HiddenCall, hidden: Tensor) -> Tensor | None:
        here = site.positions == self.at[:, None].to(site.positions.device)
        return hidden + here[..., None] * self.vector.to(hidden)


@dataclass(frozen=True)
class EntityAwareness(HeadMeasure):
    r"""How a direction at an entity's last token moves the attention that it gets from the end.

    .. math:: \Delta_{lh} = p^{lh}_{\text{end}, e}\big(h_e \leftarrow h_e + a\, d\big)
              - p^{lh}_{\text{end}, e}

    for the last real token of each row and the last token e of its entity, in all layers after the
    one whose output is changed. One sample is one row. The control is the mean over random
    directions of the same norm.

    Args:
        direction: ``(size,)``, d: of a sparse autoencoder's latent for known or for unknown
            entities, or a difference of means; its norm counts.
        layer: after which d is added.
        entities: for each row of the data the position of the entity's last token (0 is the row's
            first real token).
        strength: a; in the paper 100 for Gemma 2 and 20 for Llama 3.1 with unit directions. There
            is no default: it depends on the size of the model's states.
        draws, seed: of the random directions (10 in the paper, latents of the autoencoder there).
        tower: which one; by default "text", or the only one.

    Returns:
        `Scores` of the later layers; ``details["t"]`` is Welch's t statistic ``(layers, heads)`` of
        the rows against those of the control, NaN for one row.

    Cost: 2 + draws forwards a batch; the attention asked for is O(N dim) a layer.

    Raises:
        AttnbiasError: no data, a layer without another after it, entities that do not fit.

    Source: after Do I Know This Entity? Knowledge Awareness and Hallucinations in Language Models
    (2024, arXiv 2411.14257); authors' code read. Finding the latents needs the autoencoders of the
    work and is left out: any direction is taken.
    """

    name: ClassVar[str] = "entity_awareness"
    direction: Tensor = field(repr=False)
    layer: int
    entities: tuple[int, ...] = field(repr=False)
    strength: float
    draws: int = 10
    seed: int = 0
    tower: str | None = None

    def __post_init__(self) -> None:
        if self.direction.ndim != 1 or not bool(self.direction.isfinite().all()):
            raise AttnbiasError(
                f"direction must be finite numbers (size,), got {tuple(self.direction.shape)}."
            )
        if self.draws < 1:
            raise AttnbiasError(f"draws must be 1 or more, got {self.draws}.")

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> Scores:
        given, where = forwards(data, "EntityAwareness"), tower_sites(model, self.tower)
        tower, layers = where[0].tower, [s.layer for s in where if s.layer > self.layer]
        if not layers or self.layer < 0:
            raise AttnbiasError(f"layer must be 0 to {where[-1].layer - 1}, got {self.layer}.")
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(self.draws, len(self.direction), generator=generator)
        noise = noise / noise.norm(dim=1, keepdim=True) * self.direction.float().norm().cpu()
        parts: list[Tensor] = []
        others: list[Tensor] = []
        done, total = 0, len(given) * (2 + self.draws)
        with evaluating(model), torch.no_grad(), bar(total, "entities", progress) as tick:
            for inputs in given:
                at = self._at(inputs, done)
                done += len(at)
                plain = _looks(model, inputs, at, tower, layers, None, self.layer)
                tick()
                moved = []
                for vector in (self.direction, *noise):
                    push = self.strength * vector
                    moved.append(_looks(model, inputs, at, tower, layers, push, self.layer) - plain)
                    tick()
                parts.append(moved[0])
                others.append(torch.stack(moved[1:]).mean(0))
        if done != len(self.entities):
            raise AttnbiasError(f"entities has {len(self.entities)} rows, and the data {done}.")
        samples, control = gather(parts), gather(others)
        details = {"t": _welch(samples, control)}
        return Scores(self.name, tower, tuple(layers), samples, control, details)

    def _at(self, inputs: Mapping[str, Any], done: int) -> Tensor:
        """``(batch, 2)``: the positions of the last token and of the entity."""
        mask = inputs.get("attention_mask")
        ids = inputs["input_ids"]
        real = torch.ones_like(ids) if mask is None else mask
        rows = self.entities[done : done + len(ids)]
        last = real.long().sum(1).cpu() - 1
        if len(rows) != len(ids) or any(
            not 0 <= e <= end for e, end in zip(rows, last.tolist(), strict=True)
        ):
            raise AttnbiasError(
                f"entities must name a token of each row of the data, got {rows} for rows that end "
                f"at {last.tolist()}."
            )
        return torch.stack([last, torch.tensor(rows)], 1)


def _looks(
    model: nn.Module,
    inputs: Mapping[str, Any],
    at: Tensor,
    tower: str,
    layers: list[int],
    push: Tensor | None,
    layer: int,
) -> Tensor:
    """``(batch, layers, heads)``: attention of the last token to the entity."""
    aims = torch.full((len(at), int(at[:, 0].max()) + 1, 1), -1)
    aims[torch.arange(len(at)), at[:, 0], 0] = at[:, 1]
    with observe(model, [At("entity")], targets={"entity": aims}, layers={tower: layers}) as seen:
        if push is None:
            model(**inputs)
        else:
            with steer(model, _Push(vector=push, at=at[:, 1], layers=(layer,), towers=(tower,))):
                model(**inputs)
    values = seen.tensor("at", tower).values[0, ..., 0]  # (layers, batch, heads, queries)
    return values.nanmean(-1).movedim(1, 0)


def _welch(one: Tensor, other: Tensor) -> Tensor:
    """``(layers, heads)``: the difference of the means over its standard error."""
    spread = (one.var(0) / len(one) + other.var(0) / len(other)).sqrt()
    return (one.mean(0) - other.mean(0)) / spread
