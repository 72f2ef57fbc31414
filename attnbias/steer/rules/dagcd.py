"""DAGCD: more probability for the tokens of the context that the model is really using."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError, Refused
from attnbias.steer.by_position import to_positions
from attnbias.steer.rule import Rule
from attnbias.steer.site import SiteCall
from attnbias.steer.step import Step


@dataclass(frozen=True, kw_only=True)
class DAGCD(Rule):
    r"""Add the attention of context-reading heads to the distribution of the next token.

    With :math:`a_h(c)` head h's attention, from the newest token, to the distinct token c of the
    context (mean where it is repeated), normalised over the context:

    .. math:: p' \propto p + \alpha\, \frac{H(p)}{\log |V|}\, U, \qquad
        U(c) \propto \textstyle\sum_h \omega_h a_h(c), \quad \omega = \beta / \sum_h \beta_h

    over the tokens that the detector :math:`\beta_0 + \sum_h \beta_h a_h(c) > 0` takes for used
    and that are among the `top_rank` likeliest next tokens; U is 0 elsewhere.

    Args:
        strength: alpha from 0; 0 is the plain model. Published: 2 for base models, 4 for chat and
            instruct models.
        top_rank: Published: 10.
        end_tokens: tokens that end an answer (end of text, newline): where one of them is the
            likeliest, the scores are left as they are.
        context: names of spans; several make one.
        heads: pairs (layer, head); ``"all"``: candidates, until `fit` finds them. Published: the 10
            heads with the largest coefficients.
        coefficients, intercept: the detector's, filled in by `fit`, in the order of `heads`.
        layers, towers, phase: see `Rule`.

    The scores that come back are :math:`\log p'`: greedy decoding is as published, and sampling is
    well defined.

    Cost: one row of attention of the chosen heads in each step; no second forward.

    Raises:
        Refused: steering before the detector is fitted, inputs without token ids.
        AttnbiasError: numbers out of range, a missing span.

    Source: Dynamic Attention-Guided Context Decoding for Mitigating Context Faithfulness
    Hallucinations in Large Language Models, 2025. Authors' code read. Departs: the released code's
    case of a budget of one token (where U replaces even an end token) is left out; the detector's
    tokens are sampled from all of the context, not from entities that a tagger finds.
    """

    strength: float = 2.0
    top_rank: int = 10
    end_tokens: tuple[int, ...] = ()
    context: tuple[str, ...] = ("document 0",)
    coefficients: tuple[float, ...] = ()
    intercept: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("end_tokens", "context", "coefficients"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise AttnbiasError(f"strength must be a number from 0, got {self.strength!r}.")
        if self.top_rank < 1:
            raise AttnbiasError(f"top_rank must be a whole number from 1, got {self.top_rank!r}.")
        pairs = self.heads != "all" and all(isinstance(head, tuple) for head in self.heads)
        if self.coefficients and not (pairs and len(self.heads) == len(self.coefficients)):
            raise AttnbiasError(
                "coefficients must hold one number for each (layer, head) of heads, got "
                f"{len(self.coefficients)} for {self.heads!r}."
            )

    @property
    def needs(self) -> tuple[str, ...]:
        return self.context

    def ready(self) -> None:
        if not self.coefficients:
            raise Refused(
                "DAGCD has no detector yet: run rule = DAGCD(heads='all').fit(model, examples)."
            )

    def look(self, site: SiteCall) -> Tensor | None:
        """The last query's attention by position, ``(batch, heads, positions)``."""
        if self.strength == 0:
            return None
        return to_positions(site.attention(site.last[:, None])[:, :, 0], site.key_positions)

    def logits(self, step: Step) -> Tensor | None:
        if self.strength == 0:
            return None
        if step.tokens is None:
            raise Refused("DAGCD gives probability to tokens of the context: pass input_ids.")
        plain = step.logits.softmax(-1)
        entropy = torch.special.entr(plain).sum(-1, keepdim=True) / math.log(plain.shape[-1])
        use = torch.stack([self._use(step, row, plain[row]) for row in range(len(plain))])
        new = plain + self.strength * entropy * use
        scores = (new / new.sum(-1, keepdim=True)).log()
        ends = torch.tensor(self.end_tokens, device=plain.device, dtype=torch.long)
        stays = torch.isin(plain.argmax(-1), ends) | (use.sum(-1) == 0)
        return torch.where(stays[:, None], step.logits, scores)

    def _use(self, step: Step, row: int, plain: Tensor) -> Tensor:
        """The utilisation distribution of one row, ``(vocabulary,)``."""
        from attnbias.steer.retrieval import shares

        use = torch.zeros_like(plain)
        inside = step.where(self.context)[row].nonzero()[:, 0]
        if step.tokens is None or not len(inside):
            return use
        positions = step.positions[row][inside]
        maps = torch.stack([self._map(step, row, head, positions) for head in self.heads])
        distinct, found = shares(maps.to(plain), step.tokens[row][inside].to(plain.device))
        weights = torch.tensor(self.coefficients, dtype=plain.dtype, device=plain.device)
        ranks = (plain[None] > plain[distinct][:, None]).sum(1)
        used = (found @ weights + self.intercept > 0) & (ranks < self.top_rank)
        mass = (found @ (weights / weights.sum())).masked_fill(~used, 0.0)
        return use.index_copy(0, distinct, mass / mass.sum().clamp(min=1e-8))

    def _map(self, step: Step, row: int, head: Any, positions: Tensor) -> Tensor:
        layer, number = head
        maps = next(found for site, found in step.looked.items() if site.layer == layer)
        found: Tensor = maps[row, self.heads_at(layer).index(number)]
        return found[positions]

    def fit(
        self,
        model: nn.Module,
        examples: Sequence[ContextExample],
        *,
        count: int = 10,
        size: int = 2000,
        seed: int = 0,
        progress: bool = True,
    ) -> DAGCD:
        """The rule with its detector: logistic regression over all heads, then over the best.

        Tokens of the context that answer are positive, those that rank below `top_rank` in the
        step that answers are negative; classes are balanced. Steps that the model itself would
        answer otherwise are left out, as is the rest of that answer.

        Args:
            model: in eval mode; it is left as it is. examples: prompts with context and answer.
            count: heads to keep. Published: 10. size: tokens to fit on. Published: 2000.
            seed: of the sample. progress: show a bar (needs rich; silent without it).

        Cost: one forward and the answer's rows of attention for each example.

        Raises:
            AttnbiasError: no examples, none that the model answers by its context.
        """
        from attnbias.steer.retrieval import utilisation

        return utilisation(self, model, examples, count, size, seed, progress)


@dataclass(frozen=True)
class ContextExample:
    """A prompt whose answer is in its context, for `DAGCD.fit`.

    Args:
        inputs: the model's inputs for one row, the prompt up to the answer.
        context: where it stands, ``(start, stop)`` in token positions.
        answer: the tokens that should come next.
    """

    inputs: Mapping[str, Any]
    context: tuple[int, int]
    answer: tuple[int, ...]
