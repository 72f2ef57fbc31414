"""Which parts of a document a text encoder's similarity hangs on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError, Refused
from attnbias.hub.sites import unwrap
from attnbias.measures.base import Data, Measure, bar, evaluating
from attnbias.measures.embedding import (
    Pooling,
    check_pooling,
    device_of,
    last_states,
    pooled,
    tokens,
)
from attnbias.measures.position_sensitivity import Retrieval


@dataclass(frozen=True)
class Saliency:
    """Curves of `PositionSaliency`: ``samples`` (pairs, points), their mean and its error."""

    samples: Tensor

    @property
    def values(self) -> Tensor:
        """``(points,)``: the mean over the pairs."""
        return self.samples.mean(0)

    @property
    def error(self) -> Tensor:
        """``(points,)``: standard error of the mean."""
        found: Tensor = self.samples.std(0) / len(self.samples) ** 0.5
        return found


@dataclass(frozen=True)
class PositionSaliency(Measure):
    r"""Which parts of a document its similarity to a query hangs on, by position.

    .. math:: g_t = \left\lVert \frac{\partial \cos(q, d)}{\partial e_t} \right\rVert_2

    for the input embedding :math:`e_t` of each token of the document; clipped at its 99th
    percentile, divided by it, and read off at 100 points from the first token to the last. Evidence
    in the middle leaves the two ends to show the model's own preference.

    Args:
        retrieval, tokenizer, pooling, limit: as in `PositionSensitivity`.
        least: tokens that a document must have (1024). between: relative positions of the evidence
            that count (0.4 to 0.6). points: of the curve (100). percentile: 99.
        special: keep the tokens that the tokenizer adds; by default they go, as (for a model with
            one at the end) in the authors' code.

    Returns:
        `Saliency`, one row for each query that counts, in their order.

    Cost: one forward for each query, one forward and backward for each of their documents.

    Raises:
        AttnbiasError: no pair counts; `data` given. Refused: a model without input embeddings.

    Source: PosIR: Position-Aware Heterogeneous Information Retrieval Benchmark (2026); authors'
    code read.
    """

    name: ClassVar[str] = "position_saliency"
    retrieval: Retrieval
    tokenizer: Any = field(repr=False)
    pooling: Pooling = "mean"
    limit: int | None = None
    least: int = 1024
    between: tuple[float, float] = (0.4, 0.6)
    points: int = 100
    percentile: float = 99.0
    special: bool = False

    def __post_init__(self) -> None:
        check_pooling(self.pooling)
        if self.points < 2 or not 0 < self.percentile <= 100:
            raise AttnbiasError(
                f"points must be 2 or more and percentile over 0 and up to 100, got {self.points}, "
                f"{self.percentile}."
            )

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> Saliency:
        if data is not None:
            raise AttnbiasError("PositionSaliency has its texts in `retrieval`; give no data.")
        chosen = self._chosen()
        rows = []
        with evaluating(model), bar(len(chosen), "documents", progress) as tick:
            for number in chosen:
                rows.append(self._row(model, number))
                tick()
        return Saliency(torch.stack(rows))

    def _chosen(self) -> list[int]:
        given, (low, high) = self.retrieval, self.between
        known = {
            n: len(self.tokenizer(given.documents[n])["input_ids"]) for n in set(given.positives)
        }
        chosen = [
            n
            for n, at in enumerate(given.relative.tolist())
            if low <= at <= high and known[given.positives[n]] >= self.least
        ]
        if not chosen:
            raise AttnbiasError(
                f"no document of {self.least} tokens or more has its evidence between {low} and "
                f"{high}; lower `least` or widen `between`."
            )
        return chosen

    def _row(self, model: nn.Module, number: int) -> Tensor:
        given, device = self.retrieval, device_of(model)
        query = tokens(self.tokenizer, [given.queries[number]], self.limit, device)
        with torch.no_grad():
            wanted = pooled(last_states(model, query), query["attention_mask"], self.pooling)
        document = given.documents[given.positives[number]]
        inputs = tokens(self.tokenizer, [document], self.limit, device)
        with torch.enable_grad(), _leaf(model) as found:
            vector = pooled(last_states(model, inputs), inputs["attention_mask"], self.pooling)
            slope = torch.autograd.grad((vector * wanted).sum(), found[0])[0][0]
        size = slope.detach().double().norm(dim=-1).cpu()
        if not self.special:
            plain = set(self.tokenizer(document, add_special_tokens=False)["input_ids"])
            size = size[[n for n, i in enumerate(inputs["input_ids"][0].tolist()) if i in plain]]
        most = torch.quantile(size, self.percentile / 100)
        size = size.clamp_max(most) / most if most > 0 else size
        return resampled(size, self.points)


def resampled(values: Tensor, points: int) -> Tensor:
    """Values read off at `points` even places from the first to the last, by straight lines."""
    at = torch.linspace(0, 1, points, dtype=torch.float64) * (len(values) - 1)
    left = at.floor().long().clamp_max(max(len(values) - 2, 0))
    right = (left + 1).clamp_max(len(values) - 1)
    share = at - left
    return values[left] * (1 - share) + values[right] * share


@contextmanager
def _leaf(model: nn.Module) -> Iterator[list[Tensor]]:
    """The input embeddings of the forward inside, as a tensor that a gradient can be asked for."""
    embed = getattr(unwrap(model), "get_input_embeddings", lambda: None)()
    if not isinstance(embed, nn.Module):
        raise Refused(f"{type(unwrap(model)).__name__} has no input embeddings that are known.")
    found: list[Tensor] = []

    def cut(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        found.append(output.detach().requires_grad_())
        return found[0]

    handle = embed.register_forward_hook(cut)
    try:
        yield found
    finally:
        handle.remove()
