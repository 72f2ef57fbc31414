"""Mixing: how far a change of one token spreads, with the sink and without it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.measures._maps import attention_maps
from attnbias.measures._residual import main_tower, residual
from attnbias.measures.base import Data, Measure, bar, evaluating, forwards


@dataclass(frozen=True)
class Mixed:
    """What `Mixing` found.

    Attributes:
        tower: of the model. layers: its layers.
        change: ``(samples, 2, layers, tokens)``: relative change of each token's hidden state after
            each layer, first with the token `sink` and then without it; NaN at the changed token,
            at the sink, before the changed token in a decoder, and where a text has no such token.
        bound: the same shape: the entry of the bound for these tokens.
        positions: which token was changed, for each sample.
    """

    tower: str
    layers: tuple[int, ...]
    change: Tensor
    bound: Tensor
    positions: tuple[int, ...]

    @property
    def spread(self) -> Tensor:
        """``(samples, 2, layers)``: the mean change over the tokens."""
        return self.change.nanmean(-1)

    @property
    def growth(self) -> Tensor:
        """``(samples, layers)``: spread without the sink over spread with it."""
        return self.spread[:, 1] / self.spread[:, 0]

    @property
    def bound_growth(self) -> Tensor:
        """``(samples, layers)``: the same ratio of the mean bounds."""
        mean = self.bound.nanmean(-1)
        return mean[:, 1] / mean[:, 0]

    def __str__(self) -> str:
        first, second = self.spread[..., -1].nanmean(0).tolist()
        return (
            f"A change of one token moves the others by {first:.3g} with the sink and by "
            f"{second:.3g} without it ({len(self.change)} samples, relative, after layer "
            f"{self.layers[-1]} of {self.tower})."
        )


@dataclass(frozen=True)
class Mixing(Measure):
    r"""How far a change of one token spreads through the layers, with and without the sink.

    Token p of each text is replaced by another token, and the relative change of every other
    token's hidden state is measured after each layer:

    .. math:: \delta_i^l = \frac{\lVert \tilde h_i^l - h_i^l \rVert}{\lVert h_i^l \rVert}

    once as it is and once with the token `sink` hidden from every query (its place stays empty, so
    that positions do not move). Beside it stands the bound of the source on the sensitivity,

    .. math:: \Big\lVert \frac{\partial h_i^l}{\partial h_p^0} \Big\rVert \le C^l
              \Big[\prod_{k \le l} \Big(I + \sum_h |A^{k h}|\Big)\Big]_{i p}

    without its constant C (a Lipschitz constant of the layers; attention is taken as fixed in it).

    Args:
        position: p; by default the middle token of each text.
        replacement: id of the token to put there; by default the next token of the same text that
            differs (before it, where there is none after).
        sink: the token that is hidden, 0 for the first real token; another one is a control.
        tower: by default the text tower, else the first.

    Cost: four forwards for each entry of the data and two maps of each head: short texts.

    Raises:
        AttnbiasError: no data, no ``input_ids``, a position that a text does not have or that is
            the sink, a text in which all tokens are the same.

    Source: Why do LLMs attend to the first token?, 2025 (arXiv 2504.02732); after the abstract and
    notes on it (perturbing one token of a text in Gemma 7B with and without BOS; the bound by
    paths). Open there and chosen here: the replacement, the relative norm, the mean over tokens,
    and that the sink is hidden instead of cut off. The rate of heads with a sink at threshold 0.8
    is `SinkMetric(threshold=0.8)`.
    """

    name: ClassVar[str] = "mixing"
    position: int | None = None
    replacement: int | None = None
    sink: int = 0
    tower: str | None = None

    def __post_init__(self) -> None:
        for word in ("position", "replacement", "sink"):
            value = getattr(self, word)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            if not whole and (value is not None or word == "sink"):
                raise AttnbiasError(f"Mixing({word}) must be a whole number from 0, got {value!r}.")
        if self.position == self.sink:
            raise AttnbiasError(f"Mixing: position and sink are both {self.sink}; change another.")

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> Mixed:
        given, tower = forwards(data, "Mixing"), main_tower(model, self.tower)
        changes, bounds, places = list[Tensor](), list[Tensor](), list[int]()
        layers = tuple[int, ...]()
        with evaluating(model), bar(len(given), self.name, progress) as tick:
            for inputs in given:
                ids, real, where = self._where(inputs)
                base = {**inputs, "attention_mask": real.to(ids.dtype)}
                hidden = {**inputs, "attention_mask": self._without(real).to(ids.dtype)}
                other = self._replaced(ids, real, where)
                pairs, products = [], []
                for number, one in enumerate((base, hidden)):
                    plain = residual(model, one, tower)
                    moved = residual(model, {**one, "input_ids": other}, tower)
                    layers, maps = attention_maps(model, one, tower)
                    gap = (moved.hidden - plain.hidden).norm(dim=-1) / plain.hidden.norm(dim=-1)
                    product = _products(maps)
                    if number:  # the hidden token has no position: room for it, to compare
                        gap = _with_room(gap, self.sink, -1)
                        product = _with_room(_with_room(product, self.sink, -1), self.sink, -2)
                    pairs.append(gap.movedim(0, 1))
                    products.append(product)
                causal = not bool((maps.triu(1) > 0).any())
                for row, place in enumerate(where):
                    change = torch.stack([gap[row] for gap in pairs])
                    bound = torch.stack([product[row, :, :, place] for product in products])
                    tokens = torch.arange(change.shape[-1])
                    left = (tokens == place) | (tokens == self.sink)
                    left |= (tokens < place) if causal else False
                    left |= tokens >= int(real[row].sum())
                    changes.append(change.cpu().masked_fill(left, torch.nan))
                    bounds.append(bound.cpu().masked_fill(left, torch.nan))
                    places.append(place)
                tick()
        return Mixed(tower, layers, _stacked(changes), _stacked(bounds), tuple(places))

    def _where(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor, list[int]]:
        """Token ids, which of them are real, and the position that is changed in each row."""
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor):
            raise AttnbiasError("Mixing: data must have input_ids; a token is replaced there.")
        mask = inputs.get("attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        found = []
        for row, length in enumerate(real.sum(-1).tolist()):
            place = length // 2 if self.position is None else self.position
            if place == self.sink:
                place += 1
            if max(place, self.sink) >= length:
                raise AttnbiasError(
                    f"Mixing: row {row} has {length} tokens; position {place} and sink "
                    f"{self.sink} must be among them."
                )
            found.append(place)
        return ids, real, found

    def _without(self, real: Tensor) -> Tensor:
        """The mask with the sink of each row taken out."""
        return real & (real.cumsum(-1) - 1 != self.sink)

    def _replaced(self, ids: Tensor, real: Tensor, where: list[int]) -> Tensor:
        """The ids with one token of each row replaced."""
        found = ids.clone()
        for row, place in enumerate(where):
            slots = real[row].nonzero()[:, 0]
            line = ids[row, slots]
            if self.replacement is not None:
                found[row, slots[place]] = self.replacement
                continue
            order = [*range(place + 1, len(line)), *range(place - 1, self.sink, -1)]
            others = [int(line[n]) for n in order if n != self.sink and line[n] != line[place]]
            if not others:
                raise AttnbiasError(
                    f"Mixing: all tokens of row {row} are the same; write replacement=ID."
                )
            found[row, slots[place]] = others[0]
        return found


def _products(maps: Tensor) -> Tensor:
    """(batch, layers, i, p): the products of I + sum_h |A| up to each layer."""
    step = maps.nan_to_num(0.0).abs().sum(2) + torch.eye(maps.shape[-1], dtype=maps.dtype)
    found = [step[:, 0]]
    for layer in range(1, step.shape[1]):
        found.append(step[:, layer] @ found[-1])
    return torch.stack(found, 1)


def _with_room(values: Tensor, at: int, dim: int) -> Tensor:
    """An entry of NaN put in."""
    first, rest = values.narrow(dim, 0, at), values.narrow(dim, at, values.shape[dim] - at)
    return torch.cat([first, torch.full_like(values.narrow(dim, 0, 1), torch.nan), rest], dim)


def _stacked(parts: list[Tensor]) -> Tensor:
    size = max(part.shape[-1] for part in parts)
    return torch.stack(
        [nn.functional.pad(p, (0, size - p.shape[-1]), value=torch.nan) for p in parts]
    )
