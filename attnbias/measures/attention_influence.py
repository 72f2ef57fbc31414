"""AttentionInfluence: how much a text's loss grows when retrieval heads are masked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.measures.base import Data, Measure, bar, evaluating, forwards
from attnbias.measures.scores import Head, Scores
from attnbias.measures.texts import check_pairs, row_losses


@dataclass(frozen=True)
class Influence:
    """The losses of texts with and without some heads.

    Attributes:
        plain, masked: ``(texts,)`` float64, mean cross-entropy of the next tokens in nats, of the
            whole model and of the model with the heads masked. NaN for texts of less than two
            tokens.
        heads: the heads masked.
    """

    plain: Tensor
    masked: Tensor
    heads: tuple[Head, ...]

    @property
    def values(self) -> Tensor:
        """``(texts,)``: the relative growth of the loss."""
        return (self.masked - self.plain) / self.plain

    def select(self, share: float = 0.2, domains: Sequence[str] | None = None) -> Tensor:
        """The numbers of the texts with the highest scores, in order of the texts.

        Scores of different kinds of text cannot be compared: each domain gives its own share.

        Args:
            share: of each domain, at least one text; 0.2 as published.
            domains: the domain of each text; None: all are of one.
        """
        if not 0 < share <= 1:
            raise AttnbiasError(f"share must be above 0 and at most 1, got {share!r}.")
        kinds = ["" for _ in self.plain] if domains is None else list(domains)
        if len(kinds) != len(self.plain):
            raise AttnbiasError(f"domains must name {len(self.plain)} texts, got {len(kinds)}.")
        found: list[int] = []
        scores = self.values.nan_to_num(-torch.inf)
        for kind in sorted(set(kinds)):
            own = [n for n, other in enumerate(kinds) if other == kind]
            best = sorted(own, key=lambda n: (-float(scores[n]), n))
            found += best[: max(1, round(share * len(own)))]
        return torch.tensor(sorted(found))


@dataclass(frozen=True)
class AttentionInfluence(Measure):
    r"""Score texts by how much they need a small model's retrieval heads.

    .. math:: I(x) = \frac{L_{\text{masked}}(x) - L(x)}{L(x)}

    with L the mean cross-entropy of a text's next tokens and the masked model's heads attending to
    every visible key alike: :math:`1/t` at the t-th token of a decoder. A high score says that the
    text's tokens are predicted from its own context. Texts are compared within a domain only.

    Data: forwards of a language model; each row is a text, padding counts for nothing.

    Args:
        heads: pairs ``(layer, head)``; see `of`.
        mode: "uniform" as published; "zero": the heads give nothing.

    Returns:
        `Influence`.

    Cost: two forwards over every text.

    Raises:
        AttnbiasError: no heads, texts without logits.

    Source: AttentionInfluence: Adopting Attention Head Influence for Weak-to-Strong Pretraining
    Data Selection, 2025 (arXiv 2505.07293); equations read. Published: a model of 1.3B parameters,
    its heads found by `RetrievalHeads` on 800 key-value prompts with three examples, the best 5 %
    masked, the best 20 % of texts kept. The work writes the uniform weight as one over the length
    of the sequence; in a causal model that is taken here as one over the keys that a query sees.
    """

    name: ClassVar[str] = "attention_influence"
    heads: tuple[Head, ...]
    mode: Literal["uniform", "zero"] = "uniform"

    def __post_init__(self) -> None:
        pairs = check_pairs(self.heads, "heads")
        if not pairs:
            raise AttnbiasError(
                "AttentionInfluence needs heads: AttentionInfluence.of(RetrievalHeads().measure("
                "model, needles))."
            )
        object.__setattr__(self, "heads", pairs)
        if self.mode not in ("uniform", "zero"):
            raise AttnbiasError(f"mode must be 'uniform' or 'zero', got {self.mode!r}.")

    @classmethod
    def of(cls, scores: Scores, share: float = 0.05) -> AttentionInfluence:
        """With the best heads of a `Scores`: a share of all heads, 0.05 as published, one at
        least."""
        if not 0 < share <= 1:
            raise AttnbiasError(f"share must be above 0 and at most 1, got {share!r}.")
        return cls(heads=scores.top(max(1, round(share * len(scores.heads)))))

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> Influence:
        from attnbias.steer.context import steer
        from attnbias.steer.rules.block_heads import BlockHeads
        from attnbias.steer.states import tower_of

        given = forwards(data, "AttentionInfluence")
        plain, masked = [], []
        with evaluating(model), torch.no_grad(), bar(len(given), self.name, progress) as tick:
            rule = BlockHeads(heads=self.heads, mode=self.mode)
            tower = tower_of(rule, model, prefer="text")
            rule = BlockHeads(heads=self.heads, mode=self.mode, towers=(tower,))
            for forward in given:
                plain.append(row_losses(model, forward))
                with steer(model, rule):
                    masked.append(row_losses(model, forward))
                tick()
        return Influence(torch.cat(plain).cpu(), torch.cat(masked).cpu(), self.heads)
