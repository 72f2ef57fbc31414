"""GAME: where a chunk looks unfaithful, edit attention along a detector's gradient and redo it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnbias.bias import Bias, KeyBias
from attnbias.errors import AttnbiasError, Refused
from attnbias.steer.attempts import Candidate
from attnbias.steer.lookback import Detector, ratios
from attnbias.steer.loop import Loop
from attnbias.steer.rule import Heads, Rule, is_number
from attnbias.steer.site import SiteCall
from attnbias.steer.spans import Keys, keys_of


@dataclass(frozen=True, kw_only=True)
class GAME(Rule):
    r"""Generate a chunk, score its look-back ratios, redo it with edited attention if they are low.

    .. math:: c = F(\bar v), \qquad \Delta = \varepsilon \frac{\partial F / \partial v}
              {\mathrm{rms}(\partial F / \partial v)}, \qquad
              \beta^{lh} = \beta_0 + \log \frac{v^*}{1 - v^*} - \log \frac{\bar v}{1 - \bar v},
              \quad v^* = \mathrm{clip}(\bar v + \Delta)

    with :math:`\bar v` the ratio of each head averaged over the chunk (see `LookbackLens`) and
    :math:`\beta` added to the scores of all context keys of that head. Adding it multiplies
    v / (1 - v) of every token by exactly :math:`e^\beta`, so the closed form gives the wanted
    change where the ratio is the same at all tokens of the chunk, and nearly that elsewhere. A
    chunk with c at or above the threshold is kept; any other is generated once more, with the same
    random numbers, under the edit.

    Args:
        detector: F, as fitted by `LookbackLens` on the same heads.
        context: the context, as for the detector.
        chunk: tokens of a chunk. threshold: of c, in (0, 1).
        step: :math:`\varepsilon`, the root mean square over heads of the wanted change of v; 0
            changes nothing.
        prior: :math:`\beta_0`, in natural-log units, added for every head.
        clip: v stays in [clip, 1 - clip].
        heads, layers, towers: those of the detector.

    Cost: one row of attention per head and token; a chunk that scores low is decoded twice.

    Raises:
        Refused: steering without a detector.

    Source: after Gradient-guided Attention Map Editing: Towards Efficient Contextual Hallucination
    Mitigation, 2025 (arXiv 2503.08963); abstract and the caption of the overview only. From there:
    chunks, the look-back ratio, the threshold, one edit signal per head from a prior bias and the
    gradient, one regeneration. Chosen here: a logistic F on means of v, the edit as an additive
    bias on the context's scores (the rows stay distributions), the scale of the gradient, one prior
    for all heads, 0 by default, chunk 8 (that of the look-back work), threshold 0.5, step 0.1, clip
    0.01.
    """

    heads: Heads
    detector: Detector | None = None
    context: Keys = ("context",)
    chunk: int = 8
    threshold: float = 0.5
    step: float = 0.1
    prior: float = 0.0
    clip: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "context", keys_of(self.context))
        if not is_number(self.chunk) or self.chunk < 1:
            raise AttnbiasError(f"chunk must be a whole number from 1, got {self.chunk!r}.")
        if not 0 < self.threshold < 1:
            raise AttnbiasError(f"threshold must be between 0 and 1, got {self.threshold!r}.")
        if not 0 < self.clip < 0.5:
            raise AttnbiasError(f"clip must be between 0 and 0.5, got {self.clip!r}.")
        for name in ("step", "prior"):
            if not math.isfinite(getattr(self, name)):
                raise AttnbiasError(f"{name} must be a finite number.")
        if self.phase != "both":
            raise AttnbiasError(f"phase must be 'both' for GAME, got {self.phase!r}.")

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(key for key in self.context if isinstance(key, str))

    def ready(self) -> None:
        if self.detector is None:
            raise Refused(
                "GAME has no detector yet: run lens = LookbackLens(heads=...).fit(model, texts) "
                "and write GAME(detector=lens.detector, heads=...)."
            )

    def look(self, site: SiteCall) -> Tensor:
        return ratios(site, self.context)

    def bias(self, site: SiteCall) -> Bias | None:
        edit = site.state.get("edit")
        if edit is None:
            return None
        own = torch.tensor([edit[site.site.layer, head] for head in site.heads])
        own = own.to(site.device, site.dtype)[None, :, None]
        return KeyBias(site.where(self.context)[:, None].to(site.dtype) * own)

    def edit(self, features: Tensor) -> Tensor:
        """The bias of each head ``(count,)`` from the chunk's mean ratios ``(count,)``."""
        assert self.detector is not None
        known = features.detach().clone().requires_grad_()
        with torch.enable_grad():
            slope = torch.autograd.grad(self.detector.score(known), known)[0]
        size = slope.square().mean().sqrt()
        change = self.step * slope / size if bool(size > 0) else torch.zeros_like(slope)
        low, high = self.clip, 1 - self.clip
        now = features.clamp(low, high)
        wanted = (now + change).clamp(low, high)
        return self.prior + torch.where(change == 0, 0.0, wanted.logit() - now.logit())

    def decode(self, loop: Loop) -> None:
        self.ready()
        assert self.detector is not None
        while not loop.finished:
            start = loop.snapshot()
            found = loop.candidates(1, self.chunk)[0]
            features = self.detector.features(self, found.looked)
            if float(self.detector.score(features)) < self.threshold:
                edit = self.edit(features)
                if bool((edit != 0).any()):
                    loop.rewind(start, random=True)
                    loop.again()
                    found = self.redo(loop, edit)
            loop.append(found)

    def redo(self, loop: Loop, edit: Tensor) -> Candidate:
        """A chunk from here under an edit."""
        assert self.detector is not None
        values = edit.tolist()
        loop.state["edit"] = dict(zip(self.detector.places, values, strict=True))
        try:
            return loop.candidates(1, self.chunk)[0]
        finally:
            del loop.state["edit"]
