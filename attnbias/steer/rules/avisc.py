"""AvisC: contrast the model with itself seeing only the image tokens that draw attention anyway."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnbias.errors import AttnbiasError
from attnbias.steer.branch import Branch
from attnbias.steer.by_position import at_positions, to_positions
from attnbias.steer.rule import Heads, Rule
from attnbias.steer.site import SiteCall
from attnbias.steer.step import Step

BRANCH = "blind tokens"


@dataclass(frozen=True, kw_only=True)
class AVISC(Rule):
    r"""Contrast next-token scores with a branch in which only "blind" image tokens have content.

    From the prompt's last query, with :math:`a^l_j` its attention (mean of the heads) to image
    token j in layer l: the layers with the largest image share, until their cumulative share
    reaches :math:`\gamma`, are averaged; the image tokens above mean + :math:`\lambda` times
    deviation are blind. In the branch the input embeddings of all other image tokens are zero. Then

    .. math:: l' = (1 + \alpha)\, l - \alpha\, l^{\text{blind}}, \qquad
        l'_v = -\infty \text{ where } l_v < \max l + \log \beta

    Args:
        strength: alpha from 0; 0 is the plain model, without the mask. Published: 2.5 for
            LLaVA-1.5, 3 for InstructBLIP (some scripts: 1).
        share: gamma, the share of the image's attention over the layers that chosen layers reach,
            in (0, 1]. Published: 0.5.
        deviations: lambda. Published: 1.
        plausibility: the mask's beta, in (0, 1]. Published: 0.1.
        image: names of spans; several make one.
        heads, layers, towers, phase: see `Rule`. Published: all. An edit of next-token scores is of
            no head; `heads` and `layers` say whose attention is read.

    Layers and tokens are chosen for each row by itself (the released code runs one row). Where the
    branch gives NaN a row keeps its scores, as released.

    Cost: the decoding twice, the prefill once more, one row of attention per layer at the prompt.

    Raises:
        AttnbiasError: numbers out of range, a missing span.

    Source: Don't Miss the Forest for the Trees: Attentional Vision Calibration for Large Vision
    Language Models, 2024. Authors' code read; the settings are those quoted in its issues. Left
    open there and chosen here: rows of a batch.
    """

    heads: Heads = "all"
    strength: float = 2.5
    share: float = 0.5
    deviations: float = 1.0
    plausibility: float = 0.1
    image: tuple[str, ...] = ("image",)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "image", tuple(self.image))
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise AttnbiasError(f"strength must be a number from 0, got {self.strength!r}.")
        if not math.isfinite(self.deviations):
            raise AttnbiasError(f"deviations must be a number, got {self.deviations!r}.")
        for name in ("share", "plausibility"):
            if not 0 < getattr(self, name) <= 1:
                raise AttnbiasError(f"{name} must be in (0, 1], got {getattr(self, name)!r}.")

    @property
    def needs(self) -> tuple[str, ...]:
        return self.image

    @property
    def branches(self) -> Mapping[str, Branch]:
        return {BRANCH: Branch(embeds="emptied")}

    def look(self, site: SiteCall) -> Tensor | None:
        """The last query's attention to each position ``(batch, positions)``, mean of the heads."""
        if self.strength == 0 or site.phase != "prefill":
            return None
        row = site.attention(site.last[:, None])[:, :, 0].mean(1, keepdim=True)
        length = int(site.key_positions.max()) + 1
        return to_positions(row, site.key_positions, length)[:, 0]

    def blind(self, step: Step) -> Tensor:
        """Which tokens are blind: bool ``(batch, length)``, False outside the image."""
        image = step.where(self.image).expand(step.positions.shape[0], -1)
        maps = torch.stack([step.looked[site] for site in sorted(step.looked, key=str)], 1)
        found = at_positions(maps, step.positions) * image[:, None]
        shares = found.sum(-1)
        shares = shares / shares.sum(-1, keepdim=True).clamp(min=torch.finfo(shares.dtype).tiny)
        ordered, order = shares.sort(dim=-1, descending=True, stable=True)
        count = (ordered.cumsum(-1) < self.share).sum(-1, keepdim=True) + 1
        ranks = torch.arange(shares.shape[1], device=order.device)
        chosen = torch.zeros_like(shares).scatter(1, order, (ranks < count).to(shares.dtype))
        mean = (found * chosen[..., None]).sum(1) / chosen.sum(1, keepdim=True)
        tokens = image.sum(-1, keepdim=True).clamp(min=1)
        center = mean.sum(-1, keepdim=True) / tokens
        spread = ((mean - center).square() * image).sum(-1, keepdim=True) / (tokens - 1).clamp(
            min=1
        )
        return image & (mean >= center + self.deviations * spread.sqrt())

    def emptied(self, step: Step, embeddings: Tensor) -> Tensor:
        """The prompt's embeddings, zero at image tokens that are not blind."""
        empty = step.where(self.image) & ~self.blind(step)
        return embeddings.masked_fill(empty[..., None].to(embeddings.device), 0.0)

    def logits(self, step: Step) -> Tensor | None:
        if self.strength == 0:
            return None
        other = step.branch(BRANCH).logits
        other = torch.where(other.isnan().any(-1, keepdim=True), step.logits, other)
        mixed = (1 + self.strength) * step.logits - self.strength * other
        floor = step.logits.amax(-1, keepdim=True) + math.log(self.plausibility)
        return mixed.masked_fill(step.logits < floor, -torch.inf)
