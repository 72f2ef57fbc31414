"""Look-back ratios and the detector on them, shared by `LookbackLens` and `GAME`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError, Refused
from attnbias.steer.rule import Rule
from attnbias.steer.spans import Keys

if TYPE_CHECKING:
    from attnbias.hub import Site
    from attnbias.steer.site import SiteCall


def ratios(site: SiteCall, context: Keys, every: bool = False) -> Tensor:
    r"""The look-back ratio of each head, ``(batch, heads, rows)`` in float32 (float64).

    .. math:: v = \frac{A_c}{A_c + A_n}, \quad
              A_c = \frac{1}{|C|} \sum_{j \in C} A_{ij}, \quad
              A_n = \frac{1}{|N|} \sum_{j \in N} A_{ij}

    C is the context, N every token after it up to the query, by position: keys that a window hides
    count with weight 0. With no token in N the ratio is 1, with no weight on either 0.5.

    Args:
        every: all queries (one more attention call); else the last of each row (one row of the
            map).
    """
    rows = site.query_positions if every else site.query_positions.expand(site.shape[0], -1)
    if not every:
        rows = rows.gather(1, site.last[:, None])
    rows = rows.clamp(min=0)
    line = torch.arange(int(rows.max()) + 1, device=rows.device)[None]
    inside = site.among(context, line)
    stop = torch.where(inside, line + 1, 0).amax(-1, keepdim=True)
    counts = inside.long().cumsum(-1).expand(max(len(rows), len(inside)), -1)
    rows = rows.expand(len(counts), -1)
    sizes = torch.stack(
        [counts.gather(1, rows), (rows + 1 - stop).clamp(min=0)], -1
    )  # (b, rows, 2)
    groups = site.where(context).long()
    after = (site.key_positions >= stop) & (groups == 0)
    groups = torch.where(after, 2, groups)
    if every or site.shape[2] == 1:
        found = site.masses(groups[:, None], 3)[..., 1:]
    else:
        table = torch.nn.functional.one_hot(groups, 3).to(site.dtype)[..., 1:]
        found = site.attention(site.last[:, None]) @ table[:, None]
    mean = found / sizes.clamp(min=1)[:, None]
    total = mean.sum(-1)
    return torch.where(total > 0, mean[..., 0] / torch.where(total > 0, total, 1.0), 0.5)


@dataclass(frozen=True)
class Detector:
    r"""A logistic classifier on look-back ratios: the probability that a chunk is faithful.

    .. math:: F(\bar v) = \sigma(w \cdot \bar v + b)

    Args:
        places: ``(layer, head)`` of each feature. weights: w, one for each. intercept: b.
        examples: how many spans or windows it was fitted on. window: tokens of a sliding window,
            None for labelled spans.
    """

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012 - read by pydantic

    places: tuple[tuple[int, int], ...]
    weights: tuple[float, ...]
    intercept: float
    examples: int = 0
    window: int | None = None

    def __post_init__(self) -> None:
        if len(self.places) != len(self.weights) or not self.weights:
            raise AttnbiasError(
                "a detector needs one weight for each (layer, head), got "
                f"{len(self.weights)} weights for {len(self.places)} places."
            )
        if not all(math.isfinite(value) for value in (*self.weights, self.intercept)):
            raise AttnbiasError("weights and intercept of a detector must be finite numbers.")

    def direction(self, like: Tensor) -> Tensor:
        """w as a tensor."""
        return like.new_tensor(self.weights)

    def logit(self, features: Tensor) -> Tensor:
        """``w . v + b`` of features ``(..., count)``."""
        return features @ self.direction(features) + self.intercept

    def score(self, features: Tensor) -> Tensor:
        """The probability that the chunk is faithful."""
        return self.logit(features).sigmoid()

    def features(self, rule: Rule, steps: Sequence[Mapping[Site, Tensor]]) -> Tensor:
        """The mean ratios of a chunk ``(count,)`` from what `rule` looked at in each step.

        Raises:
            AttnbiasError: the rule looks at other heads than the detector was fitted on.
        """
        found, places = stacked(rule, steps)
        if places != self.places:
            raise AttnbiasError(
                f"the detector was fitted on {len(self.places)} heads from {self.places[0]} to "
                f"{self.places[-1]} (layer, head), but {type(rule).__name__} looks at "
                f"{len(places)} heads: give it the same heads and layers, and fit on this model."
            )
        return found.mean(-1)


def stacked(
    rule: Rule, steps: Sequence[Mapping[Site, Tensor]]
) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
    """Ratios ``(heads of all layers, tokens)`` of one row, and the place of each head."""
    parts, places = [], []
    for site in sorted(steps[0], key=lambda site: (site.tower, site.layer)):
        part = torch.cat([step[site][0].double() for step in steps], -1).cpu()
        heads = rule.heads_at(site.layer)
        numbers = range(len(part)) if heads == "all" else heads
        parts.append(part)
        places += [(site.layer, head) for head in numbers]
    return torch.cat(parts), tuple(places)


@dataclass(frozen=True)
class LabelledText:
    """A text whose faithfulness is known, for `LookbackLens.fit`.

    Args:
        inputs: the model's inputs for one row, prompt and response together.
        spans: named spans, as in `steer`: at least the context.
        labels: ``(start, stop, faithful)`` of parts of the response, in token positions.
    """

    inputs: Mapping[str, Any]
    spans: Mapping[str, Any]
    labels: tuple[tuple[int, int, bool], ...]


def examples(
    rule: Rule,
    model: nn.Module,
    texts: Sequence[Any],
    window: int | None,
    tick: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor, tuple[tuple[int, int], ...]]:
    """Features ``(examples, heads)``, labels, and the places of the features.

    window: None for one example per labelled part; else every window of that many tokens inside
    the labelled tokens, faithful where all of them are. tick: called after each text.
    """
    if not texts or not all(isinstance(text, LabelledText) for text in texts):
        got = "none" if not texts else type(texts[0]).__name__
        raise AttnbiasError(f"fit needs texts such as ab.rules.LabelledText(...), got {got}.")
    rows, labels = [], []
    places: tuple[tuple[int, int], ...] = ()
    for number, text in enumerate(texts):
        looked = seen(rule, model, text, number)
        tick()
        found, places = stacked(rule, [looked])
        for part, faithful in _parts(text, window, found.shape[-1], number):
            rows.append(found[:, part].mean(-1))
            labels.append(faithful)
    if len(set(labels)) < 2:
        raise AttnbiasError(
            "fit needs faithful and unfaithful parts, got "
            f"{len(labels)} parts that are all {'faithful' if labels and labels[0] else 'not'}."
        )
    return torch.stack(rows), torch.tensor(labels), places


def seen(rule: Rule, model: nn.Module, text: LabelledText, number: int = 0) -> dict[Site, Tensor]:
    """Ratios of every token of a text, by one forward."""
    from attnbias.hub import attach
    from attnbias.steer.context import Editing

    editing = Editing([rule], text.spans)
    for name in rule.needs:
        if name not in editing.spans:
            raise AttnbiasError(f"text {number} has no span {name!r}.")
    editing.memories[0].state["every"] = True
    with torch.no_grad(), attach(model, editing):
        model(**text.inputs)
        found = dict(editing.memories[0].looked)
    if not found or next(iter(found.values())).shape[0] != 1:
        raise AttnbiasError(f"text {number} must hold one row that the rule's layers see.")
    return found


def _parts(
    text: LabelledText, window: int | None, length: int, number: int
) -> list[tuple[slice, bool]]:
    """Queries that predicted each part: one before its tokens."""
    mask = text.inputs.get("attention_mask")
    shift = 0 if mask is None else int(mask[0].long().argmax())  # padding before the text
    for start, stop, _ in text.labels:
        if not 1 <= start < stop <= length - shift:
            raise AttnbiasError(
                f"text {number} labels the tokens ({start}, {stop}) of {length - shift}: "
                "expected 1 <= start < stop inside the text."
            )
    parts = [(slice(a - 1 + shift, b - 1 + shift), bool(good)) for a, b, good in text.labels]
    if window is None:
        return parts
    known = {row: good for part, good in parts for row in range(part.start, part.stop)}
    found = []
    for start in sorted(known):
        rows = range(start, start + window)
        if all(row in known for row in rows):
            found.append((slice(start, start + window), all(known[row] for row in rows)))
    return found


def logistic(features: Tensor, labels: Tensor) -> tuple[tuple[float, ...], float]:
    """Weights and intercept of scikit-learn's logistic regression with its defaults."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise Refused(
            "fitting a detector needs scikit-learn: write pip install scikit-learn."
        ) from error
    model = LogisticRegression(max_iter=1000).fit(features.numpy(), labels.numpy())
    return tuple(float(w) for w in model.coef_[0]), float(model.intercept_[0])
