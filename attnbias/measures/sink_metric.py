"""The attention sink metric: how many heads pay most of their attention to one token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.measures._residual import main_tower
from attnbias.measures.base import Data, HeadMeasure, bar, evaluating, forwards
from attnbias.measures.scores import Scores, gather
from attnbias.observe import observe
from attnbias.observe.statistics import Received


@dataclass(frozen=True)
class SinkMetric(HeadMeasure):
    r"""The share of heads that use a token as an attention sink, for every token.

    .. math:: \alpha_k^{lh} = \frac{1}{T - k + 1} \sum_{i=k}^{T} A_{ik}^{lh}, \qquad
              \mathrm{Sink}_k = \operatorname{mean}_{l, h, \text{texts}}
              \mathbb{1}[\alpha_k^{lh} > \epsilon]

    with the first T tokens of each text; the mean in :math:`\alpha_k` is over the queries that the
    model's own masks let see token k (all of them in an encoder). The scores of a head are
    :math:`\mathbb{1}[\alpha_k > \epsilon]` for the token `token`, text by text; their mean over
    heads and layers is the metric. ``details`` holds ``metric`` (that mean), ``by_token`` (Sink_k
    for each k, ``(tokens)``) and ``alpha`` (the mean of :math:`\alpha_k` over the texts,
    ``(layers, heads, tokens)``).

    Args:
        threshold: :math:`\epsilon`, published: 0.3. Another work (Why do LLMs attend to the first
            token?) takes 0.8.
        token: the position that is scored, 0 for the first real token.
        length: T, published: 64. Longer texts are cut there; None takes them whole. Without
            ``input_ids`` (images) nothing is cut.
        tower: by default the text tower, else the first.

    Cost: one forward for each entry of the data and one more fused call for each layer.

    Raises:
        AttnbiasError: no data, a threshold outside of 0 to 1, no text that has the token.

    Source: When Attention Sink Emerges in Language Models: An Empirical View, 2024
    (arXiv 2410.10781), 100 texts; authors' code read. Their 0.3 and T = 64 are the defaults. Under
    sink logits a row of the map adds up to less than one, as in the model.
    """

    name: ClassVar[str] = "sink_metric"
    threshold: float = 0.3
    token: int = 0
    length: int | None = 64
    tower: str | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
        if not (number and 0 <= self.threshold <= 1):
            raise AttnbiasError(
                f"SinkMetric(threshold) must lie between 0 and 1, got {self.threshold!r}."
            )
        if not isinstance(self.token, int) or isinstance(self.token, bool) or self.token < 0:
            raise AttnbiasError(f"SinkMetric(token) must be a position from 0, got {self.token!r}.")
        whole = isinstance(self.length, int) and not isinstance(self.length, bool)
        if self.length is not None and not (whole and self.length > 0):
            raise AttnbiasError(
                f"SinkMetric(length) must be a whole number from 1 or None, got {self.length!r}."
            )

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> Scores:
        given, parts = forwards(data, "SinkMetric"), list[Tensor]()
        tower, layers = main_tower(model, self.tower), tuple[int, ...]()
        with evaluating(model), torch.no_grad(), bar(len(given), self.name, progress) as tick:
            for inputs in given:
                with observe(model, [Received("visible")]) as seen:
                    model(**(inputs if self.length is None else cut(inputs, self.length)))
                found = seen.tensor("received", tower)
                layers = tuple(found.labels["layer"])
                for run in found.values:  # a tower that is called several times has several
                    parts.append(run.movedim(0, 1))  # (batch, layers, heads, tokens)
                tick()
        tokens = max(part.shape[-1] for part in parts)
        alpha = torch.cat(
            [nn.functional.pad(p, (0, tokens - p.shape[-1]), value=torch.nan) for p in parts]
        )
        if self.token >= tokens:
            raise AttnbiasError(
                f"SinkMetric: no text has a token {self.token}; the longest has {tokens}."
            )
        sink = (alpha > self.threshold).double().masked_fill(alpha.isnan(), torch.nan)
        scored = gather([sink[..., self.token]])
        details = {
            "metric": float(scored.nanmean()),
            "by_token": sink.nanmean((0, 1, 2)),
            "alpha": alpha.nanmean(0),
        }
        return Scores(self.name, tower, layers, scored, details=details)


def cut(inputs: Mapping[str, Any], length: int) -> dict[str, Any]:
    """The first `length` tokens of each row, whatever the padding; the rest is masked or gone."""
    ids = inputs.get("input_ids")
    if ids is None:
        return dict(inputs)
    mask = inputs.get("attention_mask")
    if mask is None:
        if ids.shape[1] <= length:
            return dict(inputs)
        mask = torch.ones_like(ids)
    if mask.ndim != 2:
        raise AttnbiasError(
            f"SinkMetric(length={length}) cuts texts by an attention_mask (batch, tokens), got "
            f"shape {tuple(mask.shape)}: write length=None."
        )
    kept = mask * (mask.cumsum(-1) <= length)
    used = int(kept.any(0).nonzero()[-1]) + 1 if bool(kept.any()) else 1
    rows = {"input_ids", "token_type_ids", "position_ids", "mm_token_type_ids"}
    return {
        name: value[:, :used] if name in rows and value.shape == ids.shape else value
        for name, value in {**inputs, "attention_mask": kept[:, :used]}.items()
    }
