"""Attention modulation: sharper self-attention, and one entity of the prompt per patch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnbias.errors import AttnbiasError
from attnbias.steer.hooks import Vectors
from attnbias.steer.rule import Heads, Rule, Towers, is_number
from attnbias.steer.site import SiteCall


@dataclass(frozen=True)
class Entity:
    """One thing of a prompt.

    Args:
        noun: the span that names it. attributes: spans of the words that describe it.
    """

    __pydantic_config__: ClassVar[dict[str, str | bool]] = {"extra": "forbid", "strict": True}

    noun: str
    attributes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AttentionModulation(Rule):
    r"""Three edits against leaking entities in text-to-image models.

    .. math:: \mathrm{softmax}\!\left(\frac{Q K^\top}{\tau \sqrt{d}}\right) \text{ (self)}, \qquad
        p'_{ij} \propto p_{ij}\, w_{g(j)}(t)\, [e(j) \in \{o_i, \varnothing\}], \quad
        o_i = \arg\max_e \sum_{j \in e} \bar p_{ij} \text{ (cross)}

    Self-attention is sharpened in the early steps. In cross-attention each patch i belongs to the
    entity :math:`o_i` whose words get the most attention, averaged over heads; it sees no word of
    another entity, and the weights of nouns and attributes depend on the phase of the denoising.
    Words of no entity (:math:`\varnothing`: the start token, "and") keep their attention up to the
    normalisation: each row keeps its total.

    Args:
        entities: the things of the prompt, by spans; at least one.
        temperature: :math:`\tau` of self-attention in the early steps; 1 leaves it.
        early: share of the denoising, from noise on, in which self-attention is sharpened.
        masking: whether a patch sees its own entity alone.
        phases: ``(end, noun, attribute)``: up to the share `end` of the denoising, the factors on
            the attention that nouns and attributes get. Ends ascend to 1. Entities come first,
            attributes later.
        steps: timesteps that the model was trained with; step t counts as
            ``1 - (t + 1) / steps`` done.
        heads: which are edited, and averaged for :math:`o_i`. layers, towers: see `Rule`.

    Cost: self-attention as it was; two more calls of cross-attention, whose keys are few.

    Raises:
        AttnbiasError: entities that share tokens; a forward that is given no timestep.

    Source: after Towards Better Text-to-Image Generation Alignment via Attention Modulation, 2024
    (arXiv 2404.13899), abstract only; no code was found. From it: a temperature in the early
    self-attention, a mask that ties each patch to one object, weights by phase. Chosen here: all
    numbers; the mask after the softmax with the row's total kept (before it is the same up to that
    total); ownership from each call's own map and not an average over layers; entities before
    attributes; spans in place of a parse of the prompt.
    """

    heads: Heads = "all"
    towers: Towers = ("self", "cross")
    entities: tuple[Entity, ...] = ()
    temperature: float = 0.8
    early: float = 0.3
    masking: bool = True
    phases: tuple[tuple[float, float, float], ...] = ((0.4, 1.5, 1.0), (1.0, 1.0, 1.5))
    steps: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "entities", tuple(self.entities))
        object.__setattr__(self, "phases", tuple(tuple(phase) for phase in self.phases))
        if not self.entities or not all(isinstance(one, Entity) for one in self.entities):
            raise AttnbiasError(
                'entities must hold ab.rules.Entity("cat", ("black",)) or more, got '
                f"{self.entities!r}."
            )
        good = self.temperature > 0 and math.isfinite(self.temperature) and 0 <= self.early <= 1
        if not good or not is_number(self.steps) or self.steps < 1:
            raise AttnbiasError(
                "temperature must be above 0, early from 0 to 1 and steps from 1, got "
                f"{self.temperature!r}, {self.early!r} and {self.steps!r}."
            )
        ends = [phase[0] for phase in self.phases]
        weights = [weight for phase in self.phases for weight in phase[1:]]
        if not ends or sorted(set(ends)) != ends or ends[-1] != 1:
            raise AttnbiasError(f"the ends of phases must ascend to 1, got {ends!r}.")
        if not all(weight >= 0 and math.isfinite(weight) for weight in weights):
            raise AttnbiasError(f"weights must be finite and not below 0, got {self.phases!r}.")

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(name for one in self.entities for name in (one.noun, *one.attributes))

    def vectors(self, site: SiteCall) -> Vectors | None:
        if site.site.kind != "self" or self.temperature == 1:
            return None
        factor = torch.where(self._done(site) < self.early, 1 / self.temperature, 1.0)
        if not bool((factor != 1).any()):
            return None
        return Vectors(query=site.query * factor.to(site.query.dtype)[:, None, None, None])

    def groups(self, site: SiteCall) -> Tensor | None:
        """0: of no entity; 2 e + 1: the noun of entity e; 2 e + 2: its attributes."""
        if site.site.kind == "self":
            return None
        found = torch.zeros(site.shape[0], site.shape[3], dtype=torch.long, device=site.device)
        for number, entity in enumerate(self.entities):
            for place, names in ((1, (entity.noun,)), (2, entity.attributes)):
                if not names:
                    continue
                here = site.where(names).expand_as(found)
                if bool((found[here] != 0).any()):
                    raise AttnbiasError(f"the entity {entity.noun!r} shares tokens with another.")
                found = found.masked_fill(here, 2 * number + place)
        return found[:, None]

    def group_count(self, site: SiteCall, groups: Tensor) -> int:
        return 2 * len(self.entities) + 1

    def reallocate(self, site: SiteCall, masses: Tensor) -> Tensor | None:
        noun, attribute = self._weights(site)
        if not self.masking and bool((noun == 1).all()) and bool((attribute == 1).all()):
            return None
        pairs = masses[..., 1:].reshape(*masses.shape[:-1], len(self.entities), 2)
        weighted = pairs * torch.stack([noun, attribute], -1)[:, None, None, None].to(pairs)
        if self.masking:
            owner = pairs.detach().sum(-1).mean(1, keepdim=True).argmax(-1, keepdim=True)
            own = torch.arange(len(self.entities), device=masses.device) == owner
            weighted = weighted * own[..., None].to(weighted)
        new = torch.cat([masses[..., :1], weighted.flatten(-2)], -1)
        total, left = masses.sum(-1, keepdim=True), new.sum(-1, keepdim=True)
        # A row with nothing left (all its words masked or weighted 0) stays as it was.
        return torch.where(left > 0, new * (total / torch.where(left > 0, left, 1.0)), masses)

    def _done(self, site: SiteCall) -> Tensor:
        """How much of the denoising is done, 0 to 1, ``(batch | 1,)``."""
        if site.timestep is None:
            raise AttnbiasError("AttentionModulation needs the timestep of a diffusion model.")
        return 1 - (site.timestep.to(site.device).to(site.dtype) + 1) / self.steps

    def _weights(self, site: SiteCall) -> tuple[Tensor, Tensor]:
        """The factors of nouns and attributes in the phase of each row."""
        done = self._done(site)
        ends = torch.tensor([phase[0] for phase in self.phases], device=site.device)
        number = torch.searchsorted(ends.to(done), done, right=True).clamp(max=len(ends) - 1)
        table = torch.tensor([phase[1:] for phase in self.phases], device=site.device)
        return table[number, 0], table[number, 1]
