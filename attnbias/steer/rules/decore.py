"""DeCoRe: contrast the model with itself minus its retrieval heads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError, Refused
from attnbias.steer.branch import Branch
from attnbias.steer.rule import Rule
from attnbias.steer.rules.block_heads import BlockHeads
from attnbias.steer.step import Step

BRANCH = "without retrieval heads"


@dataclass(frozen=True, kw_only=True)
class DeCoRe(Rule):
    r"""Contrast next-token scores with those of a branch whose retrieval heads are blocked.

    .. math:: l' = (1 + \alpha) \log p - \alpha \log p^{\text{blocked}}, \qquad
        \alpha = H(p) = -\sum_v p_v \log p_v

    The branch shares the main prompt: heads are blocked from the prompt's last token on.

    Args:
        heads: pairs (layer, head) of retrieval heads; ``"all"`` until `fit` finds them. Published:
            the 50 best by a needle test, tuned per task.
        strength: alpha; None: the entropy of the plain scores in nats. Published: None; a static
            variant has 0.5. 0 is the plain model.
        most: the largest alpha allowed, None for no limit (released as an option).
        normalised: divide the entropy by log of the vocabulary, its largest value (an option too).
        mode: ``"uniform"``: a blocked head attends to every key alike, which is what the released
            code does; ``"zero"``: it gives nothing, which is what the work describes.
        scores: the heads' retrieval scores, filled in by `fit`.
        layers, towers, phase: see `Rule`.

    Cost: the decoding twice; the prompt is not run again where the cache can be copied.

    Raises:
        Refused: steering before the heads are found. AttnbiasError: numbers out of range.

    Source: DeCoRe: Decoding by Contrasting Retrieval Heads to Mitigate Hallucinations, 2024 (arXiv
    2410.18860). Authors' code read. The variant with a smaller second model is not offered. Left
    open and chosen here: the length of the needle test, which is the user's.
    """

    strength: float | None = None
    most: float | None = None
    normalised: bool = False
    mode: Literal["uniform", "zero"] = "uniform"
    scores: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "scores", tuple(self.scores))
        for name in ("strength", "most"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise AttnbiasError(f"{name} must be None or a number from 0, got {value!r}.")
        if self.mode not in ("uniform", "zero"):
            raise AttnbiasError(f"mode must be 'uniform' or 'zero', got {self.mode!r}.")

    def ready(self) -> None:
        if self.heads == "all":
            raise Refused(
                "DeCoRe has no retrieval heads yet: write DeCoRe(heads=[(layer, head), ...]), or "
                "run rule = DeCoRe(heads='all').fit(model, needles)."
            )

    @property
    def branches(self) -> Mapping[str, Branch]:
        blocked = BlockHeads(
            mode=self.mode, heads=self.heads, layers=self.layers, towers=self.towers
        )
        return {BRANCH: Branch(rules=(blocked,), shared=True)}

    def logits(self, step: Step) -> Tensor | None:
        if self.strength == 0 or self.most == 0:
            return None
        plain = step.logits.log_softmax(-1)
        other = step.branch(BRANCH).logits.log_softmax(-1)
        if self.strength is None:
            entropy = torch.special.entr(plain.exp()).sum(-1, keepdim=True)
            alpha = entropy / math.log(plain.shape[-1]) if self.normalised else entropy
        else:
            alpha = torch.full_like(plain[:, :1], self.strength)
        alpha = alpha if self.most is None else alpha.clamp(max=self.most)
        # A token that the model itself rules out stays out.
        return torch.where(plain == -torch.inf, plain, plain + alpha * (plain - other))

    def fit(
        self, model: nn.Module, needles: Sequence[Needle], *, count: int = 50, progress: bool = True
    ) -> DeCoRe:
        """The rule with the `count` heads of the largest retrieval scores.

        A head's score is the share of the answer's tokens at which its largest attention, from the
        token before, falls on that very token inside the needle; the mean over `needles`.

        Args:
            model: in eval mode; it is left as it is. needles: prompts with a needle and its answer.
            count: heads to keep. Published: 50 (of some 1,000). Heads without any hit are not kept.
            progress: show a bar (needs rich; silent without it).

        Cost: one forward and the answer's rows of attention for each needle.

        Raises:
            AttnbiasError: no needles, a needle that lacks the answer, no head with a hit.
        """
        from attnbias.steer.retrieval import retrieval_scores

        return retrieval_scores(self, model, needles, count, progress)


@dataclass(frozen=True)
class Needle:
    """A prompt with a needle in it, for `DeCoRe.fit`.

    Args:
        inputs: the model's inputs for one row, the prompt up to the answer.
        span: where the needle stands, ``(start, stop)`` in token positions.
        answer: the tokens that should come next, each of which is in the needle.
    """

    inputs: Mapping[str, Any]
    span: tuple[int, int]
    answer: tuple[int, ...]
