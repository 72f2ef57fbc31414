"""ALFAR: attention moved from the image to the retrieved context, and logits fused with a branch
without that context.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from attnbias.bias import Bias, Bucketed, KeyBias
from attnbias.errors import AttnbiasError
from attnbias.steer.branch import Branch
from attnbias.steer.by_position import at_positions, to_positions
from attnbias.steer.rule import Rule
from attnbias.steer.site import SiteCall
from attnbias.steer.step import Step

BRANCH = "without the context"
FAINT = 1e-6  # a share of attention below this says nothing about a ratio


@dataclass(frozen=True, kw_only=True)
class ALFAR(Rule):
    r"""Reallocate the answering query's attention from image to context, and fuse logits.

    Reallocation, at the last query of each forward, with scores :math:`e` (scaled, before the
    softmax), strength :math:`k` and similarity :math:`s`:

    .. math:: e_j' = \begin{cases} e_j - k s\, u_j & j \in \text{image} \\
        e_j + k w_j\, u_j & j \in \text{context} \end{cases} \qquad
        w = \operatorname{softmax}_{j \in \text{context}} \sum_{q \in \text{question}} e_{jq}

    with :math:`u_j = e_j` for ``form="paper"``. That multiplies raw scores, so it turns on their
    sign: a negative score of an image token is pushed *up*. ``form="magnitude"`` takes
    :math:`u_j = |e_j|`: the same size, always in the direction that is meant. Both depend on where
    the zero of the scores lies, which a softmax does not; ``form="share"`` multiplies the attention
    weights themselves, by :math:`1 - k s` and :math:`1 + k w_j`: a milder edit.

    Fusion, with :math:`r` the last query's attention to the image over that to the context (mean of
    the heads, last layer), and :math:`l^-` the logits of a branch without the context:

    .. math:: l' = (1 + 1/r)\, l - (1 - r)\, l^-, \qquad
        l'_v = -\infty \text{ where } l_v < \max l + \log \beta

    Args:
        strength: k from 0; 0 leaves attention alone. Published: 0.4 (scripts: 0.1 to 0.4).
        similarity: s, the retriever's similarity of the best document (CLIP ViT-L/14-336; 0.9 or 1
            in two data sets): one number, or one per prompt of the batch.
        form: ``"magnitude"``, ``"share"`` or ``"paper"``, see above.
        fusion: whether logits are fused; False: no branch is run.
        plausibility: the mask's beta, in (0, 1]. Published: 0.7.
        keep_scale: divide the fused logits by the sum of their two factors, 1/r + r, which
            otherwise cools sampling by an amount that varies with r. Published: False.
        image, question, context: names of spans; several make one.
        heads, layers, towers, phase: see `Rule`. Published: all heads and layers.

    The weights w are computed from the prompt, per head, and kept for the tokens that follow. The
    work puts the question before the context; where it stands after it, the context cannot see it,
    and the question's own scores of the context are summed instead. Rows in which image or context
    get no attention (a sliding window) keep their logits. Layers that `layers` leaves out are not
    edited; the ratio is always read in the last one.

    Cost: one attention call on the chosen heads; the fusion's branch doubles the decoding, and its
    prefill is that of the prompt without the context.

    Raises:
        AttnbiasError: numbers out of range, a missing span.

    Source: Boosting Knowledge Utilization in Multimodal Large Language Models via Adaptive Logits
    Fusion and Attention Reallocation, 2025. Authors' code read: as released its reallocation never
    runs (its condition excludes the very branch that has the context), so that code measures the
    fusion alone; here both act. Left open and chosen here: what to do without attention to one of
    the two, and rows with padding. The forms ``"magnitude"`` and ``"share"`` are ours.
    """

    row_local: ClassVar[bool] = False
    strength: float = 0.4
    similarity: float | tuple[float, ...] = 1.0
    form: Literal["magnitude", "share", "paper"] = "magnitude"
    fusion: bool = True
    plausibility: float = 0.7
    keep_scale: bool = False
    image: tuple[str, ...] = ("image",)
    question: tuple[str, ...] = ("question",)
    context: tuple[str, ...] = ("document 0",)

    def __post_init__(self) -> None:
        super().__post_init__()
        many = self.similarity
        if not isinstance(many, (int, float)):
            object.__setattr__(self, "similarity", tuple(many))
        for name in ("image", "question", "context"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise AttnbiasError(f"strength must be a number from 0, got {self.strength!r}.")
        if not self._similarities or not all(0 <= s <= 1 for s in self._similarities):
            raise AttnbiasError(f"similarity must be from 0 to 1, got {self.similarity!r}.")
        if self.form not in ("magnitude", "share", "paper"):
            raise AttnbiasError(f"form must be 'magnitude', 'share' or 'paper', got {self.form!r}.")
        if self.form == "share" and self.strength * max(self._similarities) >= 1:
            raise AttnbiasError(
                "form='share' takes strength * similarity of an image token's attention away, so "
                f"it must be below 1, got {self.strength * max(self._similarities):g}."
            )
        if not 0 < self.plausibility <= 1:
            raise AttnbiasError(f"plausibility must be in (0, 1], got {self.plausibility!r}.")

    @property
    def _similarities(self) -> tuple[float, ...]:
        many = self.similarity
        return many if isinstance(many, tuple) else (many,)

    @property
    def needs(self) -> tuple[str, ...]:
        return (*self.image, *self.question, *self.context)

    @property
    def branches(self) -> Mapping[str, Branch]:
        return {BRANCH: Branch(without=self.context)} if self.fusion else {}

    # Attention ------------------------------------------------------------------------------------

    def acts_in(self, tower: str, layer: int, phase: str) -> bool:
        """Every layer is visited for the ratio; `bias` leaves those alone that are not chosen."""
        here = self.towers is None or tower in self.towers
        reads = self.fusion and here and self.phase in ("both", phase)
        return reads or super().acts_in(tower, layer, phase)

    def heads_in(self, tower: str, layer: int) -> Literal["all"] | tuple[int, ...]:
        return super().heads_in(tower, layer) or "all"

    def bias(self, site: SiteCall) -> Bias | None:
        layer = site.site.layer
        chosen = super().acts_in(site.site.tower, layer, site.phase) and self.heads_at(layer)
        if self.strength == 0 or not chosen:
            return None
        last = site.last[:, None]
        positions = site.key_positions
        weights = at_positions(site.frozen("weights", lambda: self._weights(site)), positions)
        image = site.where(self.image)[:, None]
        if self.form == "share":
            up = (self.strength * weights).log1p()
            down = torch.log1p(-self.strength * self._similarity(site))
        else:
            scores = site.scores(last)[:, :, 0]
            size = scores if self.form == "paper" else scores.abs()
            size = torch.where(scores == -torch.inf, 0.0, size)
            up = self.strength * weights * size
            down = -self.strength * self._similarity(site) * size
        edit = torch.where(image, down, up)
        if site.shape[2] == 1:
            return KeyBias(edit)
        table = torch.stack([torch.zeros_like(edit), edit], 2)
        numbers = torch.arange(site.shape[2], device=site.device)
        rows = (numbers == last).long()[:, None]
        return Bucketed(table, rows, torch.arange(site.shape[3], device=site.device)[None, None])

    def _similarity(self, site: SiteCall) -> Tensor:
        batch, many = site.shape[0], self._similarities
        if batch % len(many):
            raise AttnbiasError(
                f"similarity was given for {len(many)} prompts and the model runs {batch} rows."
            )
        found = torch.tensor(many, dtype=site.dtype, device=site.device)
        return found.repeat_interleave(batch // len(many))[:, None, None]

    def _weights(self, site: SiteCall) -> Tensor:
        """``(batch, heads, positions)``, 0 outside the context; each row sums to 1 over it."""
        length = int(site.key_positions.max()) + 1
        keys = site.key_positions.expand(site.shape[0], -1)
        question, context = site.where(self.question), site.where(self.context)
        asked = site.where_queries(self.question).expand(site.shape[0], -1)
        # A query of the context scores the question's keys: one product with their sum.
        ask = _summed(site, site.key, question)
        own = to_positions(_scaled(site, site.query, ask), site.query_positions, length)
        # Where the question comes later, its queries score the context's keys.
        tell = _summed(site, site.query, asked)
        later = to_positions(_scaled(site, site.key, tell), site.key_positions, length)
        both = torch.stack([own, later])
        seen = site.recall("scores")
        if seen is not None:  # a prompt in chunks
            both = both + torch.nn.functional.pad(seen, (0, length - seen.shape[-1]))
        site.frozen("scores", lambda: both)
        late = _start(question, keys) > _start(context, keys)
        scores = torch.where(late[:, None, None], both[1], both[0])
        inside = to_positions(context[:, None].to(scores.dtype), site.key_positions, length) > 0
        scores = scores.masked_fill(~inside, -torch.inf)
        return torch.where(inside.any(-1, keepdim=True), scores, 0.0).softmax(-1) * inside

    def look(self, site: SiteCall) -> tuple[Tensor, Tensor] | None:
        if not self.fusion or site.site.layer != site.depth - 1:
            return None
        row = site.attention(site.last[:, None])[:, :, 0].mean(1)
        return tuple((row * site.where(part)).sum(-1) for part in (self.image, self.context))  # type: ignore[return-value]

    # Scores ---------------------------------------------------------------------------------------

    def logits(self, step: Step) -> Tensor | None:
        if not self.fusion:
            return None
        image, context = next(iter(step.looked.values()))
        known = (image > FAINT) & (context > FAINT)
        ratio = torch.where(known, image / torch.where(known, context, 1.0), 1.0)
        ratio = ratio.to(step.logits)[:, None]
        plain, bare = step.logits, step.branch(BRANCH).logits
        fused = (1 + 1 / ratio) * plain - (1 - ratio) * bare
        if self.keep_scale:
            fused = fused / (ratio + 1 / ratio)
        floor = plain.amax(-1, keepdim=True) + math.log(self.plausibility)
        fused = fused.masked_fill(plain < floor, -torch.inf)
        return torch.where(known.to(plain.device)[:, None], fused, plain)


def _summed(site: SiteCall, vectors: Tensor, chosen: Tensor) -> Tensor:
    """The sum of the chosen vectors, ``(batch, heads, 1, dim)``, without a copy of the others."""
    return chosen[:, None, None].to(site.dtype) @ vectors.to(site.dtype)


def _scaled(site: SiteCall, many: Tensor, one: Tensor) -> Tensor:
    """Scores of many vectors with one, ``(batch, heads, many)``."""
    return (many.to(site.dtype) @ one.to(site.dtype).mT * site.scale)[..., 0]


def _start(chosen: Tensor, positions: Tensor) -> Tensor:
    """The first chosen position of each row."""
    far = torch.iinfo(torch.long).max
    return torch.where(chosen, positions, far).amin(-1).expand(positions.shape[0])
