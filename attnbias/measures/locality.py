"""Local, hybrid and global attention, by what a query's place says about the key's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.measures.base import Data, HeadMeasure, bar, evaluating, forwards
from attnbias.measures.scores import Scores, gather
from attnbias.measures.seeing import by_sample, layers_of, looked, tower_of

TARGET, LOW, HIGH = 0.09, 0.06, 0.12


@dataclass(frozen=True)
class Locality(HeadMeasure):
    r"""Normalised mutual information of the places of query and attended key.

    .. math:: \mathrm{NMI} = \frac{I(q; k)}{\sqrt{H(q)\, H(k)}}, \qquad p(q_i) = \frac1n, \quad
        p(k_j \mid q_i) = p_{ij}

    With :math:`I = H(k) - H(k \mid q)`, the entropy of the mean row less the mean entropy of the
    rows. 1 where every query has a key of its own (local attention), 0 where all queries look alike
    (global attention), hybrid between; it says nothing of how far the key is away. A head that is
    all on one key has 0.

    `measure` gives a score for each image (row of the batch) and head; `kind` names the pattern and
    `teacher` picks the layer that NMI-HAD distils, whose score is nearest to `target`.

    Args:
        tower: which one, where a model has several; by default "vision", else "text".
        target: the score of a hybrid layer, the published 0.09 (stable for 0.06 to 0.12).

    Cost: the forward and two fused calls a layer; O(tokens) memory.

    Raises:
        AttnbiasError: no data, a target outside 0 to 1.

    Source: UNIP: Rethinking Pre-trained Attention Patterns for Infrared Semantic Segmentation
    (2025, arXiv 2502.02257); authors' code read, which leaves this routine out: the formula is the
    standard one, `target` and its range are from a public review. Chosen here: all tokens count,
    the class token too (as in the released distillation), a layer's score is the mean over its
    heads, and 0.06 to 0.12 is called hybrid.
    """

    name: ClassVar[str] = "locality"
    tower: str | None = None
    target: float = TARGET

    def __post_init__(self) -> None:
        if not 0 <= self.target <= 1:
            raise AttnbiasError(f"Locality(target) must be between 0 and 1, got {self.target}.")

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> Scores:
        """A score for each row of the data and head; see `Measure.measure`."""
        from attnbias.observe import statistics

        given = forwards(data, "Locality")
        tower = tower_of(model, "Locality", self.tower, "vision")
        wanted = [statistics.Entropy(), statistics.Received("queries")]
        parts: list[Tensor] = []
        layers: tuple[int, ...] = ()
        with evaluating(model), torch.no_grad(), bar(len(given), "locality", progress) as tick:
            for inputs in given:
                seen = looked(model, inputs, wanted, tower)
                rows = by_sample(seen, "entropy", tower)
                parts.append(nmi(rows, by_sample(seen, "received[queries]", tower)))
                layers = layers_of(seen, "entropy", tower)
                tick()
        return Scores(self.name, tower, layers, gather(parts))

    def kind(self, score: float) -> str:
        """ "local", "hybrid" or "global"."""
        return "global" if score < LOW else "hybrid" if score <= HIGH else "local"

    def teacher(self, scores: Scores) -> int:
        """The layer whose mean score is nearest to the target, the first of equal ones."""
        gap = (scores.values.nanmean(-1) - self.target).abs()
        return scores.layers[int(gap.argmin())]


def nmi(entropy: Tensor, received: Tensor) -> Tensor:
    """From the entropy of each query ``(..., queries)`` and the mean row ``(..., keys)``."""
    count = (~entropy.isnan()).sum(-1)
    key = received.nan_to_num(0.0)
    of_key = -torch.xlogy(key, key).sum(-1)
    shared = (of_key - entropy.nanmean(-1)).clamp_min(0)
    norm = (count.double().log() * of_key).clamp_min(0).sqrt()
    found = torch.where(norm > 0, shared / norm, 0.0)
    return torch.where(count > 1, found, torch.nan)
