"""SGRS: a next token is accepted only where its saliency on the earlier outputs is not low."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from attnbias.errors import AttnbiasError
from attnbias.steer.loop import Loop, Probe
from attnbias.steer.rule import Heads, Layers, Rule, is_number
from attnbias.steer.site import SiteCall
from attnbias.steer.spans import Keys, keys_of


class Row(NamedTuple):
    """A row of a layer's attention ``(heads, keys)``, its values, where its gradient goes."""

    attention: Tensor
    value: Tensor
    probe: Tensor
    earlier: Tensor


@dataclass(frozen=True, kw_only=True)
class SGRS(Rule):
    r"""Saliency-guided rejection sampling: resample a token that looks away from earlier outputs.

    .. math:: S_{ij} = \frac{1}{H} \sum_h \left| A^h_{ij}\, \frac{\partial L}{\partial A^h_{ij}}
              \right|, \quad \bar S_i = \frac{S_i}{\lVert S_i \rVert_2}, \quad
              s(c) = \frac{1}{|\mathcal L|} \sum_{l \in \mathcal L} \frac{1}{|J|} \sum_{j \in J}
              \bar S^l_{ij}, \qquad L = -\log p(c)

    A token c is drawn from the `count` likeliest and accepted where :math:`s(c) \ge \tau`, with
    :math:`\tau` = alpha times the mean of the last `window` accepted scores (0 without any); a
    rejected one is taken out and another drawn, up to `rounds` times, then the token with the
    highest s of all is taken. :math:`\partial L / \partial A_{ij} = \partial L / \partial o_i
    \cdot v_j`: one row is enough, no map is built.

    Args:
        count: K, published 5. alpha: published 0.6. window: W, published 5. rounds: R, published 3.
        after: J is every token after these keys, published the image.
        row: which row i is. ``"predicting"``: the token before, whose output predicts c.
            ``"candidate"``, published: that of c itself, run one step further. Under a causal mask
            L does not depend on that row: its gradient, and so s, is exactly 0, and every token
            from the second on falls through to the first one drawn.
        cold_start: without any token in J: ``"score 1"``, published, accepts and remembers a score
            of 1, which inflates tau for the next `window` tokens; ``"skip"`` accepts and remembers
            nothing.
        layers: published 6, 7 and 8 (of 32).
        heads, towers: see `Rule`.

    Cost: one forward a token with gradients on, and one backward of it for each scored candidate
    (a forward too with ``row="candidate"``).

    Raises:
        Refused: under ``torch.inference_mode``, or a cache other than the default one.

    Source: Hallucination Begins Where Saliency Drops, 2026 (arXiv 2601.20279); authors' code read.
    The row that predicts, ``"predicting"``, is ours: the published row has no gradient. The token
    is drawn from the scores after the call's logits processors; the public code has none.
    """

    heads: Heads = "all"
    layers: Layers = (6, 7, 8)
    count: int = 5
    alpha: float = 0.6
    window: int = 5
    rounds: int = 3
    after: Keys = ("image",)
    row: Literal["predicting", "candidate"] = "predicting"
    cold_start: Literal["score 1", "skip"] = "score 1"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "after", keys_of(self.after))
        for name in ("count", "window", "rounds"):
            value = getattr(self, name)
            if not is_number(value) or value < 1:
                raise AttnbiasError(f"{name} must be a whole number from 1, got {value!r}.")
        if not 0 <= self.alpha < float("inf"):
            raise AttnbiasError(f"alpha must be a finite number from 0, got {self.alpha!r}.")
        for name, known in (
            ("row", ("predicting", "candidate")),
            ("cold_start", ("score 1", "skip")),
        ):
            if getattr(self, name) not in known:
                raise AttnbiasError(f"{name} must be one of {known}, got {getattr(self, name)!r}.")
        if self.phase != "both":
            raise AttnbiasError(f"phase must be 'both' for SGRS, got {self.phase!r}.")

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(key for key in self.after if isinstance(key, str))

    def outputs(self, site: SiteCall, out: Tensor) -> Tensor | None:
        """Adds a zero that takes the gradient of the head outputs."""
        if not torch.is_grad_enabled() or site.shape[2] != 1:
            return None
        probe = torch.zeros_like(out).requires_grad_()
        site.state[site.site] = probe
        return out + probe

    def look(self, site: SiteCall) -> Row | None:
        if not torch.is_grad_enabled() or site.shape[2] != 1:
            return None
        inside = site.where(self.after)
        stop = torch.where(inside, site.key_positions + 1, 0).amax(-1, keepdim=True)
        earlier = site.key_positions >= stop
        if self.row == "candidate":  # not the candidate itself
            earlier = earlier & (site.key_positions < site.query_positions)
        return Row(
            site.attention()[0, :, 0].detach(),
            site.value[0].detach().to(site.dtype),
            site.state[site.site],
            earlier[0],
        )

    def decode(self, loop: Loop) -> None:
        history: list[float] = []
        while not loop.finished:
            step = loop.step_with_gradients()
            scores = loop.scores()
            count = min(self.count, int((scores > -torch.inf).sum()))
            best = scores.softmax(-1).topk(count)
            loop.append(
                self.choose(
                    best.indices.tolist(),
                    best.values,
                    lambda token: self.saliency(step, token),  # noqa: B023 - called right here
                    history,
                )
            )

    def choose(
        self,
        tokens: list[int],
        weights: Tensor,
        saliency: Callable[[int], float | None],
        history: list[float],
    ) -> int:
        """Draw, score, accept or draw again; `history` gets the score of the token returned."""
        threshold = self.alpha * mean(history[-self.window :]) if history else 0.0
        left = list(range(len(tokens)))
        found: dict[int, float] = {}
        for _ in range(min(self.rounds, len(tokens))):
            place = int(torch.multinomial(weights[left], 1))
            token = tokens[left.pop(place)]
            score = saliency(token)
            if score is None:  # nothing to look back at
                if self.cold_start == "score 1":
                    history.append(1.0)
                return token
            if score >= threshold:
                history.append(score)
                return token
            found[token] = score
        for place in left:
            found[tokens[place]] = saliency(tokens[place]) or 0.0
        chosen = max(found, key=lambda token: found[token])
        history.append(found[chosen])
        return chosen

    def saliency(self, step: Probe, token: int) -> float | None:
        """s of one candidate; None where J is empty."""
        seen = step
        if self.row == "candidate":
            seen = step.follow(torch.tensor([token], device=step.logits.device))
        rows: list[Row] = list(seen.looked.values())
        if not bool(rows[0].earlier.any()):
            return None
        with torch.enable_grad():
            loss = -step.logits.log_softmax(-1)[token]
        grads = torch.autograd.grad(
            loss,
            [row.probe for row in rows],
            retain_graph=True,
            allow_unused=self.row == "candidate",
        )
        found = []
        for row, grad in zip(rows, grads, strict=True):
            slope = torch.zeros_like(row.probe) if grad is None else grad
            by_key = (row.value @ slope[0, :, 0, :, None].to(row.value.dtype))[..., 0]
            salient = (row.attention * by_key).abs().mean(0)
            found.append(float((salient / salient.norm().clamp(min=1e-9))[row.earlier].mean()))
        return mean(found)
