"""Heads found by where they look while a model answers: retrieving, or using a context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.steer.by_position import to_positions
from attnbias.steer.rule import Heads, Rule
from attnbias.steer.site import SiteCall

if TYPE_CHECKING:
    from attnbias.steer.rules.dagcd import DAGCD, ContextExample
    from attnbias.steer.rules.decore import DeCoRe, Needle


@dataclass(frozen=True, kw_only=True)
class _Rows(Rule):
    """Keeps some queries' attention and changes nothing."""

    heads: Heads = "all"
    start: int = 0
    found: dict[Any, Tensor] = field(default_factory=dict)

    def look(self, site: SiteCall) -> bool:
        rows = (site.query_positions[0] >= self.start).nonzero()[:, 0]
        maps = site.attention(rows.expand(site.shape[0], -1))[0]
        for number, head in enumerate(site.heads):
            place = (site.site.layer, head)
            self.found[place] = to_positions(maps[number, None], site.key_positions)[0]
        return True


class Answered(NamedTuple):
    """A forward over a prompt and its answer.

    Attributes:
        maps: by (layer, head), the answering queries' attention ``(answer, positions)``.
        tokens: by position. logits: of the answer's tokens, ``(answer, vocabulary)``.
    """

    maps: dict[tuple[int, int], Tensor]
    tokens: Tensor
    logits: Tensor


@torch.no_grad()
def answered(
    model: nn.Module, rule: Rule, inputs: Mapping[str, Any], answer: Sequence[int]
) -> Answered:
    """Run a prompt with its answer and read the queries that answer, on the rule's candidates."""
    from attnbias.steer.context import steer

    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.shape[0] != 1:
        raise AttnbiasError("fit needs inputs of one row with input_ids for each example.")
    if not answer:
        raise AttnbiasError("fit needs an answer of at least one token for each example.")
    more = torch.tensor([list(answer)[:-1]], dtype=ids.dtype, device=ids.device)
    given = {name: value for name, value in inputs.items() if name != "position_ids"}
    for name, fill in (("attention_mask", 1), ("token_type_ids", 0), ("mm_token_type_ids", 0)):
        if isinstance(given.get(name), Tensor):
            given[name] = torch.cat([given[name], torch.full_like(more, fill)], 1)
    given["input_ids"] = torch.cat([ids, more], 1)
    mask = given.get("attention_mask")
    real = torch.ones_like(given["input_ids"]) if mask is None else mask
    tokens = given["input_ids"][0][real[0].bool()]
    places: dict[str, Any] = {"heads": rule.heads, "layers": rule.layers, "towers": rule.towers}
    reader = _Rows(start=len(tokens) - len(answer), **places)
    with steer(model, reader):
        output = model(**given)
    logits = output.logits[0][real[0].bool()]
    return Answered(dict(reader.found), tokens, logits[-len(answer) :])


def retrieval_scores(
    rule: DeCoRe, model: nn.Module, needles: Sequence[Needle], count: int, progress: bool
) -> DeCoRe:
    """See `DeCoRe.fit`."""
    from attnbias.steer.rules.decore import Needle
    from attnbias.steer.scoring import bar

    if not needles or not all(isinstance(one, Needle) for one in needles):
        raise AttnbiasError("fit needs needles such as ab.rules.Needle(inputs, span, answer).")
    if count < 1:
        raise AttnbiasError(f"count must be a number of heads from 1, got {count!r}.")
    total: dict[tuple[int, int], float] = {}
    with bar(len(needles), progress, "DeCoRe") as tick:
        for needle in needles:
            start, stop = needle.span
            run = answered(model, rule, needle.inputs, needle.answer)
            inside = run.tokens[start:stop].tolist()
            lost = [token for token in needle.answer if token not in inside]
            if lost:
                raise AttnbiasError(f"the answer's token {lost[0]} is not in the needle {inside}.")
            wanted = torch.tensor(needle.answer, device=run.tokens.device)
            for place, rows in run.maps.items():
                at = rows.argmax(-1)
                hits = (at >= start) & (at < stop) & (run.tokens[at] == wanted)
                total[place] = total.get(place, 0.0) + float(hits.float().mean())
            tick()
    scores = {place: value / len(needles) for place, value in total.items() if value > 0}
    if not scores:
        raise AttnbiasError(
            "no head looked at a needle's token while it was said: give needles that the model "
            "answers."
        )
    best = sorted(scores, key=lambda place: (-scores[place], place))[:count]
    return replace(rule, heads=tuple(best), scores=tuple(scores[place] for place in best))


# A context in use ---------------------------------------------------------------------------------


def shares(attention: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct tokens of a context, and each head's attention to them, summing to 1.

    Args:
        attention: ``(heads, context)``. tokens: ``(context,)``; repeated ones are averaged.

    Returns:
        Tokens ``(distinct,)`` and shares ``(distinct, heads)``.
    """
    distinct, which = torch.unique(tokens, return_inverse=True)
    counts = torch.bincount(which, minlength=len(distinct))
    sums = attention.new_zeros(len(distinct), attention.shape[0])
    mean = sums.index_add(0, which, attention.T) / counts[:, None]
    return distinct, mean / mean.sum(0, keepdim=True).clamp(min=1e-8)


def logistic(features: Tensor, labels: Tensor, penalty: float = 1.0) -> tuple[Tensor, Tensor]:
    r"""L2 logistic regression: minimise ``C * sum(log loss) + |w|^2 / 2``, C = 1 / penalty.

    Newton's method in float64, with the intercept free of the penalty. Returns coefficients and
    intercept.
    """
    x = torch.cat([features.double(), features.new_ones(len(features), 1).double()], 1)
    y, weights = labels.double(), x.new_zeros(x.shape[1])
    ridge = torch.full_like(weights, penalty)
    ridge[-1] = 1e-9
    for _ in range(100):
        chance = torch.sigmoid(x @ weights)
        slope = x.T @ (chance - y) + ridge * weights
        curve = (x * (chance * (1 - chance))[:, None]).T @ x + torch.diag(ridge)
        step = torch.linalg.solve(curve, slope)
        weights = weights - step * min(1.0, 5.0 / float(step.abs().max().clamp(min=1e-12)))
        if float(step.abs().max()) < 1e-9:
            break
    return weights[:-1], weights[-1]


def utilisation(
    rule: DAGCD,
    model: nn.Module,
    examples: Sequence[ContextExample],
    count: int,
    size: int,
    seed: int,
    progress: bool,
) -> DAGCD:
    """See `DAGCD.fit`."""
    from attnbias.steer.rules.dagcd import ContextExample
    from attnbias.steer.scoring import bar

    if not examples or not all(isinstance(one, ContextExample) for one in examples):
        raise AttnbiasError(
            "fit needs examples such as ab.rules.ContextExample(inputs, context, answer)."
        )
    positive: list[Tensor] = []
    negative: list[Tensor] = []
    places: list[tuple[int, int]] = []
    with bar(len(examples), progress, "DAGCD") as tick:
        for example in examples:
            start, stop = example.context
            run = answered(model, rule, example.inputs, example.answer)
            places = sorted(run.maps)
            for step, token in enumerate(example.answer):
                if int(run.logits[step].argmax()) != token:
                    break  # from here on the model does not answer so
                rows = torch.stack([run.maps[place][step, start:stop] for place in places])
                distinct, found = shares(rows, run.tokens[start:stop])
                ranks = (run.logits[step][None] > run.logits[step][distinct][:, None]).sum(1)
                used = distinct == token
                positive.append(found[used])
                negative.append(found[~used & (ranks >= rule.top_rank)])
            tick()
    good, bad = _balanced(positive, negative, size, seed)
    features = torch.cat([good, bad])
    labels = torch.cat([torch.ones(len(good)), torch.zeros(len(bad))]).to(features.device)
    first, _ = logistic(features, labels)
    best = first.abs().argsort(descending=True, stable=True)[:count].sort().values
    weights, intercept = logistic(features[:, best], labels)
    return replace(
        rule,
        heads=tuple(places[number] for number in best.tolist()),
        coefficients=tuple(weights.tolist()),
        intercept=float(intercept),
    )


def _balanced(
    positive: list[Tensor], negative: list[Tensor], size: int, seed: int
) -> tuple[Tensor, Tensor]:
    good = torch.cat(positive) if positive else torch.empty(0)
    bad = torch.cat(negative) if negative else torch.empty(0)
    if not len(good) or not len(bad):
        raise AttnbiasError(
            "fit needs examples that the model answers by a token of the context, and contexts "
            f"with other tokens too: {len(good)} used and {len(bad)} unused tokens were met."
        )
    generator = torch.Generator().manual_seed(seed)

    def some(rows: Tensor) -> Tensor:
        order = torch.randperm(len(rows), generator=generator)[: size // 2]
        return rows[order.to(rows.device)]

    return some(good), some(bad)
