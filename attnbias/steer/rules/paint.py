"""PAINT: two sets of image tokens, chosen by the vision tower, raise their own scores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnbias.bias import Bias
from attnbias.errors import AttnbiasError, Refused
from attnbias.steer.placing import on_last
from attnbias.steer.rule import Rule
from attnbias.steer.site import SiteCall
from attnbias.steer.spans import Keys, keys_of

VISION = "vision"


@dataclass(frozen=True, kw_only=True)
class PAINT(Rule):
    r"""Raise the scores of local and summary image tokens for the token that is being written.

    .. math:: e_j \leftarrow e_j + \alpha\,|e_j| \ (j \in \text{local}), \qquad
              e_j \leftarrow e_j + \beta\,|e_j| \ (j \in \text{summary})

    for the last query of every call, before the softmax; the absolute value makes it a rise
    whatever the sign of the score.

    Args:
        alpha, beta: strengths of local and summary tokens; 0.7 and 0.3 (defaults of the released
            arguments; its CHAIR command has 0.9 and 0.3). 0 changes nothing.
        share: the part of the patches that are local; 0.25 as published.
        image: the span (or spans) of the image tokens, one for each patch in the order of the
            vision tower. Several images of a row are ``image=("image 0", "image 1")``.
        local, summary: the tokens themselves instead of the vision tower's choice, for towers
            without a class token: give both, and name the text tower alone.
        towers: the vision tower, which is only looked at, and the text tower.
        layers: text layers; 2 to 31 of 32 as published: ``layers=range(2, 32)``.
        heads, phase: see `Rule`; as published all heads.

    How the tokens are chosen, by the attention of the vision tower's class token summed over all
    heads: local are the top `share` in its first layer; summary are the patches above the third
    quartile plus 1.5 times the range between the quartiles in its second-to-last layer; a token in
    both sets is summary alone. The choice is made in the forward that holds the image and kept.

    Cost: one row of attention per vision layer; one row of scores per text layer and step.

    Raises:
        AttnbiasError: strengths or a share out of range, one of local and summary alone.
        Refused: no forward of the vision tower in this context, or image tokens that are not as
            many as its patches.

    Source: Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large
    Vision-Language Model, 2025 (arXiv 2501.12206); authors' code read. Departs: images are chosen
    one by one (the released code reads the first image of a batch); the classifier-free guidance
    against a prompt without the image, which the released commands add with gamma 1.1, is not part
    of the rule. The raw product turns a score of 0 into no rise at all; that is the paper's form.
    """

    alpha: float = 0.7
    beta: float = 0.3
    share: float = 0.25
    image: Keys = ("image",)
    local: Keys | None = None
    summary: Keys | None = None

    row_local = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "image", keys_of(self.image))
        if (self.local is None) != (self.summary is None):
            raise AttnbiasError("PAINT takes local and summary together, got one of them.")
        for name in ("local", "summary"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, keys_of(getattr(self, name)))
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not (math.isfinite(value) and value >= 0):
                raise AttnbiasError(f"{name} must be a finite number from 0, got {value!r}.")
        if isinstance(self.share, bool) or not 0 < self.share <= 1:
            raise AttnbiasError(f"share must be above 0 and at most 1, got {self.share!r}.")

    @property
    def needs(self) -> tuple[str, ...]:
        keys = self.image if self.local is None or self.summary is None else ()
        keys = (*keys, *(self.local or ()), *(self.summary or ()))
        return tuple(key for key in keys if isinstance(key, str))

    def ready(self) -> None:
        if self.local is None and not any(t.startswith(VISION) for t in self.towers or ()):
            raise Refused(
                "PAINT chooses image tokens by the vision tower: write PAINT(heads='all', "
                "towers=('vision', 'text')), or give local= and summary=."
            )

    def _looks(self, tower: str) -> bool:
        return self.local is None and tower.startswith(VISION)

    def acts_in(self, tower: str, layer: int, phase: str) -> bool:
        if self._looks(tower):  # in all layers, whichever are edited
            return self.towers is not None and tower in self.towers
        return super().acts_in(tower, layer, phase)

    def heads_in(self, tower: str, layer: int) -> Literal["all"] | tuple[int, ...]:
        return "all" if self._looks(tower) else super().heads_in(tower, layer)

    def look(self, site: SiteCall) -> Tensor | None:
        """Attention of the class token on each patch, summed over heads: ``(images, patches)``."""
        if not self._looks(site.site.tower):
            return None
        return site.attention(slice(0, 1)).detach()[:, :, 0, 1:].sum(1)

    def bias(self, site: SiteCall) -> Bias | None:
        if self._looks(site.site.tower) or (self.alpha == 0 and self.beta == 0):
            return None
        if self.local is None or self.summary is None:
            kept: Tensor = site.frozen("strength", lambda: self._chosen(site))
            strength = site.grown(kept, 0.0)
        else:
            summary = site.where(self.summary)
            strength = self._strength(site.where(self.local), summary, site)
        scores = site.scores(site.last[:, None])
        rise = scores.abs().masked_fill(scores == -torch.inf, 0.0) * strength[:, None, None]
        return on_last(site, rise)

    def _strength(self, local: Tensor, summary: Tensor, site: SiteCall) -> Tensor:
        zero = torch.zeros(local.shape, dtype=site.dtype, device=local.device)
        return zero.masked_fill(local, self.alpha).masked_fill(summary, self.beta)

    def _chosen(self, site: SiteCall) -> Tensor | None:
        """The strength of each key of this call ``(batch, keys)``; None without a new image."""
        seen = [site.looked[at] for at in sorted(site.looked, key=lambda at: at.layer)]
        places = site.where(self.image).expand(site.shape[0], -1)
        if not seen:  # a later part of a prompt, or one before its image
            zero = torch.zeros(places.shape, dtype=site.dtype, device=places.device)
            return None if site.past else zero
        local, summary = tokens(seen[0], seen[max(len(seen) - 2, 0)], self.share)
        strength = self._strength(local, summary, site).flatten()
        if int(places.sum()) != len(strength):
            raise Refused(
                f"PAINT needs one image token for each patch of the vision tower, got "
                f"{int(places.sum())} tokens in {', '.join(map(str, self.image))} and "
                f"{len(strength)} patches: name all image tokens in image=, or give local= and "
                "summary=."
            )
        whole = torch.zeros(places.shape, dtype=strength.dtype, device=places.device)
        return whole.masked_scatter(places, strength.to(places.device))


def tokens(first: Tensor, last: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Local and summary patches by two maps of class attention ``(images, patches)``: booleans."""
    count = int(first.shape[1] * share)
    local = torch.zeros_like(first, dtype=torch.bool)
    local.scatter_(1, first.topk(count, 1).indices, True)
    low, high = (last.quantile(q, 1, keepdim=True) for q in (0.25, 0.75))
    summary = last > high + 1.5 * (high - low)
    return local & ~summary, summary
