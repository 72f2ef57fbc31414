"""What is left of a model when heads are taken out one tenth at a time; and taking them out."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError, Refused
from attnbias.measures.base import Data, Measure, bar, evaluating, forwards
from attnbias.measures.head_importance import head_counts, loss_without
from attnbias.measures.losses import Loss, tower_sites
from attnbias.measures.scores import Head


@dataclass(frozen=True)
class Pruned:
    """A pruning curve.

    Attributes:
        shares: ``(steps,)``, the share of all heads taken out, from 0.
        samples: ``(rows, steps)``, the score of every row, more is better.
        heads: for each step, the heads that are out.
    """

    shares: Tensor
    samples: Tensor
    heads: tuple[tuple[Head, ...], ...] = field(repr=False)

    @property
    def values(self) -> Tensor:
        """``(steps,)``: the mean score over the rows."""
        return self.samples.mean(0)

    @property
    def area(self) -> float:
        """Mean height of the curve over the shares (trapezoids): one number to compare orders."""
        height = (self.values[1:] + self.values[:-1]) / 2
        width = self.shares[1:] - self.shares[:-1]
        return float((height * width).sum() / width.sum())

    def free(self, loss: float) -> float:
        """The largest share up to which no step scores more than `loss` below the whole model."""
        fine = self.values >= self.values[0] - loss
        stop = int(fine.long().cumprod(0).sum())
        return float(self.shares[stop - 1])


@dataclass(frozen=True)
class HeadPruning(Measure):
    r"""The score of a model while its heads are taken out in a given order, without retraining.

    .. math:: S(k) = \mathbb{E}_x\, s\big(x;\ \xi_h = 0 \text{ for the first } k
              \text{ heads of the order}\big), \qquad k = \mathrm{round}(n\, s\, H)

    Args:
        order: heads ``(layer, head)``, the first goes first; by the paper the least important of
            the whole model first: ``scores.ranked()[::-1]`` of `HeadImportance`. Heads that are not
            named are never taken out.
        step: share of all heads taken out between two points (0.1 in the paper; its script for BERT
            has 0.05).
        score: ``score(outputs, inputs)``, one number a row, more is better; by default minus the
            loss of `HeadImportance`.
        tower: which one; by default "text", or the only one.

    Returns:
        `Pruned`.

    Cost: one forward a step and batch.

    Raises:
        AttnbiasError: no data, no loss, a head that does not exist or comes twice.

    Source: Are Sixteen Heads Really Better than One? (2019, arXiv 1905.10650), section 4; equations
    read. Here the order is fixed before the first head goes, as in the paper.
    """

    name: ClassVar[str] = "head_pruning"
    order: tuple[Head, ...]
    step: float = 0.1
    score: Loss | None = None
    tower: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", tuple((int(a), int(b)) for a, b in self.order))
        if len(set(self.order)) != len(self.order) or not self.order:
            raise AttnbiasError("order must name heads (layer, head), each of them once.")
        if not 0 < self.step <= 1:
            raise AttnbiasError(f"step must be a share over 0 and up to 1, got {self.step!r}.")

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> Pruned:
        given, tower = forwards(data, "HeadPruning"), tower_sites(model, self.tower)[0].tower
        counts = head_counts(model, tower, given[0])
        total = sum(counts.values())
        missing = [h for h in self.order if not 0 <= h[1] < counts.get(h[0], 0)]
        if missing:
            raise AttnbiasError(
                f"order: {tower} has no layer {missing[0][0]}, head {missing[0][1]}."
            )
        steps = [0]
        while steps[-1] < len(self.order):
            steps.append(
                min(max(round(len(steps) * self.step * total), steps[-1] + 1), len(self.order))
            )
        parts = []
        with (
            evaluating(model),
            torch.no_grad(),
            bar(len(given) * len(steps), "heads pruned", progress) as tick,
        ):
            for inputs in given:
                rows = []
                for count in steps:
                    rows.append(self._score(model, inputs, self.order[:count], tower))
                    tick()
                parts.append(torch.stack(rows, 1).double().cpu())
        shares = torch.tensor(steps, dtype=torch.float64) / total
        return Pruned(shares, torch.cat(parts), tuple(self.order[:count] for count in steps))

    def _score(
        self, model: nn.Module, inputs: Mapping[str, Any], out: tuple[Head, ...], tower: str
    ) -> Tensor:
        found = loss_without(model, inputs, out, tower, self.score)
        return -found if self.score is None else found


def remove_heads(model: nn.Module, heads: Iterable[Head], tower: str | None = None) -> nn.Module:
    """A copy of a model without some heads: smaller projections, the same outputs as with gates.

    The query, key, value and output matrices lose the rows and columns of the heads. Where query
    heads share a key head, the key head goes with the last of them, and all key heads left must
    serve as many query heads: one that is wanted for that alone stays, with output weights of zero.
    So does one head of a layer that loses all. The config still tells the old numbers: the copy is
    for running, not for `save_pretrained`.

    Args:
        heads: ``(layer, head)``. tower: which one; by default "text", or the only one.

    Raises:
        AttnbiasError: a head that does not exist.
        Refused: a layer whose projections are not four linear maps known by name.
    """
    gone = {(int(layer), int(head)) for layer, head in heads}
    found = copy.deepcopy(model)
    where = tower_sites(found, tower)
    unknown = sorted(layer for layer, _ in gone if layer not in {site.layer for site in where})
    if unknown:
        raise AttnbiasError(f"{where[0].tower} has no layer {unknown[0]}.")
    for site in where:
        out = {head for layer, head in gone if layer == site.layer}
        if out:
            _shrink(found, site.name, out)
    return found


def _shrink(model: nn.Module, name: str, out: set[int]) -> None:
    module: Any = model.get_submodule(name)
    parts = _projections(model, name)
    if parts is None or hasattr(module, "sinks"):
        raise Refused(
            f"{type(module).__name__}: heads are removed where query, key, value and output are "
            "four linear layers known by name; use ab.rules.BlockHeads(heads=...) here."
        )
    query, key, value, output = parts
    size = getattr(module, "head_dim", None) or module.attention_head_size
    heads, groups = query.out_features // size, key.out_features // size
    missing = sorted(head for head in out if not 0 <= head < heads)
    if missing:
        raise AttnbiasError(f"{name} has {heads} heads, and head {missing[0]} is to be removed.")
    share = heads // groups
    rows = [list(range(g * share, (g + 1) * share)) for g in range(groups)]
    alive = [[h for h in row if h not in out] for row in rows]
    each = max(max(len(row) for row in alive), 1)
    stays = [g for g, row in enumerate(alive) if row] or [0]
    kept: list[int] = []
    for g in stays:
        spare = [h for h in rows[g] if h in out]
        kept += sorted(alive[g] + spare[: each - len(alive[g])])
    with torch.no_grad():
        for head in out & set(kept):
            output.weight[:, head * size : (head + 1) * size] = 0
    _cut(query, kept, size, 0)
    _cut(key, stays, size, 0)
    _cut(value, stays, value.out_features // groups, 0)
    _cut(output, kept, size, 1)
    for attribute, number in (
        ("num_key_value_groups", each),
        ("num_heads", len(kept)),
        ("num_attention_heads", len(kept)),
        ("all_head_size", len(kept) * size),
    ):
        if hasattr(module, attribute):
            setattr(module, attribute, number)


def _projections(model: nn.Module, name: str) -> tuple[nn.Linear, ...] | None:
    """Query, key, value and output of an attention module, by the names that models use."""
    module: Any = model.get_submodule(name)
    parent: Any = model.get_submodule(name.rpartition(".")[0])
    ways = (
        (module, "q_proj", "k_proj", "v_proj", module, "o_proj"),
        (module, "q_proj", "k_proj", "v_proj", module, "out_proj"),
        (module, "query", "key", "value", getattr(parent, "output", None), "dense"),
    )
    for owner, query, key, value, last, output in ways:
        found = [getattr(owner, n, None) for n in (query, key, value)]
        found.append(getattr(last, output, None))
        if all(type(part) is nn.Linear for part in found):
            return tuple(found)  # type: ignore[arg-type]
    return None


def _cut(linear: nn.Linear, heads: list[int], size: int, side: int) -> None:
    """Keep some heads of a projection: its rows (side 0) or its columns (side 1)."""
    index = torch.cat([torch.arange(h * size, (h + 1) * size) for h in heads])
    index = index.to(linear.weight.device)
    grad = linear.weight.requires_grad
    weight = linear.weight.detach().index_select(side, index).contiguous()
    linear.weight = nn.Parameter(weight, requires_grad=grad)
    if side == 0:
        linear.out_features = len(index)
        if linear.bias is not None:
            bias = linear.bias.detach().index_select(0, index)
            linear.bias = nn.Parameter(bias, requires_grad=grad)
    else:
        linear.in_features = len(index)
