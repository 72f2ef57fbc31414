"""The fit behind `FocusDirections`: heads by their score, directions by gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.steer.context import check_places
from attnbias.steer.rules.focus_directions import FocusDirections, FocusExample, FocusFit
from attnbias.steer.scoring import bar
from attnbias.steer.shares import repeat

if TYPE_CHECKING:
    from attnbias.hub import Call

Pair = tuple[int, int]


@dataclass
class Rows:
    """What one head's softmax over the answer's rows is made of, in float32.

    rest: ``(rows, keys)``, the model's masks and biases; sink: one more logit, or None.
    """

    query: Tensor  # (rows, dim)
    key: Tensor  # (keys, dim)
    rest: Tensor
    relevant: Tensor  # bool (keys)
    scale: float
    sink: Tensor | None

    def share(self, direction: Tensor | None = None) -> Tensor:
        """The mean share of the relevant passage, with a direction added to the queries."""
        query = self.query if direction is None else self.query + direction
        scores = query @ self.key.T * self.scale + self.rest
        if self.sink is not None:
            scores = torch.cat([scores, self.sink.expand(len(scores), 1)], -1)
        return scores.softmax(-1)[:, : len(self.relevant)][:, self.relevant].sum(-1).mean()


class _Reader:
    """A participant that hands the answer's rows of the chosen heads to a function."""

    role = "see"

    def __init__(self, rule: FocusDirections, take: Callable[[Pair, Rows], None]) -> None:
        self.rule, self.take = rule, take
        self.example: FocusExample | None = None

    def begin_forward(self, forward: int) -> None: ...

    def end_forward(self, forward: int) -> None: ...

    def see(self, call: Call, extra: Any, output: Tensor, lse: Tensor | None) -> None:
        site, one = call.site, self.example
        if one is None or not self.rule.acts_in(site.tower, site.layer, call.phase):
            return
        rows = _span(call.query_positions[0], one.response, "response")
        relevant = _span(call.key_positions[0], one.relevant, "relevant")
        heads = self.rule.heads_at(site.layer)
        total = call.query.shape[1]
        chosen = tuple(range(total)) if heads == "all" else heads
        keys = repeat(call.key, total)
        first, last = int(rows.nonzero()[0]), int(rows.nonzero()[-1]) + 1
        rest = torch.zeros(1, 1, last - first, keys.shape[2], device=keys.device)
        if call.bias is not None:
            rest = call.bias[..., first:last, :].dense().float()
        sink = call.sink
        for head in chosen:
            self.take(
                (site.layer, head),
                Rows(
                    call.query[0, head, first:last].float(),
                    keys[0, head].float(),
                    rest[0, min(head, rest.shape[1] - 1)],
                    relevant,
                    call.scale,
                    None if sink is None else sink[head].detach().float(),
                ),
            )


def learn(
    rule: FocusDirections,
    model: nn.Module,
    examples: Sequence[FocusExample],
    top: int,
    epochs: int,
    rate: float,
    seed: int,
    progress: bool,
) -> FocusDirections:
    """See `FocusDirections.fit`."""
    _check(rule, model, examples, top, epochs, rate)
    base = replace(rule, directions=(), fitted=None)
    with bar(len(examples) * (2 + epochs), progress, "FocusDirections") as tick:
        sums: dict[Pair, float] = {}

        def score(pair: Pair, rows: Rows) -> None:
            sums[pair] = sums.get(pair, 0.0) + float(rows.share())

        _read(base, model, examples, score, tick)
        if not sums:
            raise AttnbiasError(
                "FocusDirections acts at no layer that the model calls: check layers, towers."
            )
        heads = sorted(sums, key=lambda pair: -sums[pair])[:top]
        kept: dict[Pair, list[Rows]] = {pair: [] for pair in heads}
        chosen = replace(base, heads=tuple(heads))
        _read(chosen, model, examples, lambda pair, rows: kept[pair].append(rows), tick)
        directions = _train(kept, epochs, rate, seed, tick)
    count = len(examples) * len(heads)
    with torch.no_grad():
        after = sum(float(rows.share(directions[pair])) for pair in heads for rows in kept[pair])
    fitted = FocusFit(
        examples=len(examples),
        epochs=epochs,
        rate=float(rate),
        seed=seed,
        scores=tuple(sums[pair] / len(examples) for pair in heads),
        before=sum(sums[pair] for pair in heads) / count,
        after=after / count,
    )
    return replace(
        chosen,
        directions=tuple(tuple(directions[pair].tolist()) for pair in heads),
        fitted=fitted,
    )


@torch.no_grad()
def _read(
    rule: FocusDirections,
    model: nn.Module,
    examples: Sequence[FocusExample],
    take: Callable[[Pair, Rows], None],
    tick: Callable[[], None],
) -> None:
    from attnbias.hub import attach

    reader = _Reader(rule, take)
    with attach(model, reader):
        for example in examples:
            reader.example = example
            model(**example.inputs)
            tick()


def _train(
    kept: dict[Pair, list[Rows]], epochs: int, rate: float, seed: int, tick: Callable[[], None]
) -> dict[Pair, Tensor]:
    """Directions that raise the share; each head has its own, and AdamW keeps them apart."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[Pair, Tensor] = {}
    for pair, rows in kept.items():
        start = torch.randn(rows[0].query.shape[-1], generator=generator) * 0.01
        found[pair] = start.to(rows[0].query.device).requires_grad_()
    optimizer = torch.optim.AdamW(list(found.values()), lr=rate)
    count = len(next(iter(kept.values())))
    with torch.enable_grad():
        for _ in range(epochs):
            for number in range(count):
                optimizer.zero_grad()
                shares = [rows[number].share(found[pair]) for pair, rows in kept.items()]
                sum(-share for share in shares).backward()  # type: ignore[union-attr]
                optimizer.step()
                tick()
    return {pair: direction.detach() for pair, direction in found.items()}


def _span(positions: Tensor, span: tuple[int, int], name: str) -> Tensor:
    inside = (positions >= span[0]) & (positions < span[1])
    if not bool(inside.any()):
        raise AttnbiasError(f"{name} must be a span of tokens of its row, got {span!r}.")
    return inside


def _check(
    rule: FocusDirections,
    model: nn.Module,
    examples: Sequence[Any],
    top: int,
    epochs: int,
    rate: float,
) -> None:
    from attnbias.hub import sites

    if not examples or not all(isinstance(one, FocusExample) for one in examples):
        raise AttnbiasError(
            "fit needs examples such as ab.rules.FocusExample(inputs, relevant=(5, 20), "
            f"response=(40, 44)), got {type(examples[0]).__name__ if examples else 'none'}."
        )
    for name, value in (("top", top), ("epochs", epochs)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise AttnbiasError(f"{name} must be a whole number above 0, got {value!r}.")
    if not rate > 0:
        raise AttnbiasError(f"rate must be above 0, got {rate!r}.")
    if rule.phase == "decode":
        raise AttnbiasError(
            "fit reads whole prompts, where phase='decode' never acts: write 'both'."
        )
    if model.training:
        raise AttnbiasError("fit needs the model in eval mode: write model.eval() first.")
    check_places(rule, sites(model))
