"""Induction heads: those that find an earlier copy of the token at hand and read what came next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.measures.base import Data, HeadMeasure, bar, evaluating
from attnbias.measures.circuits import copying
from attnbias.measures.probes import (
    First,
    attention_at,
    drawer,
    next_losses,
    text_tower,
)
from attnbias.measures.scores import Scores, gather

_BATCH = 8


@dataclass(frozen=True)
class InductionHeads(HeadMeasure):
    r"""Prefix matching on repeated random tokens, with the copying of each head and its control.

    A list of random tokens is repeated. Over the queries i of all blocks but the first,

    .. math:: \mathrm{prefix}_h = \operatorname{mean}_i \sum_{m \ge 1} p^h_{i,\; i - mL + 1}

    the attention to the tokens that came after the earlier copies of the token at hand: what comes
    next, if the text repeats itself. 1 is a perfect induction head.

    Args:
        length: tokens of the list, L. repeats: how often it stands in the probe. Published 25, 4.
        count: random lists, one sample each. seed: of the draw.
        tokens: token numbers to draw from, without repeats; None: the middle 80 % of the
            vocabulary. The work leaves out its commonest and rarest tokens and does not say which.
        first: the token before the list: "model" takes the config's, None puts none.
        copies: "all": every earlier copy counts, as in the work; "last": the last one alone.
        copying: also the copying score from the weights (see `measures.circuits.copying`).

    Returns:
        `Scores` with one sample a list. control: the same keys of probes whose blocks are different
        random lists. details: ``"copying"`` and ``"previous"`` (attention to the token before),
        ``(layers, heads)``; ``"losses"`` ``(lists, tokens)`` in nats, NaN before the first
        prediction, None for a model without next-token scores; ``"in_context"`` ``(lists,)``: mean
        loss in the last block less that in the first, negative where the model uses the copy.

    Cost: two forwards a list, O(tokens) beside each; for the copying score O(size^2 vocabulary)
    once and the eigenvalues of a matrix of the head's size for each head.

    Raises:
        AttnbiasError: fewer than two repeats, a probe longer than the model reads, data.
        Refused: a model without one tower of text, or (copying) with unknown matrices.

    Source: In-context Learning and Induction Heads, 2022 (arXiv 2209.11895); equations read. The
    eigenvalues are those of A Mathematical Framework for Transformer Circuits (2021). Departs: the
    entries of one query are summed over its earlier copies, where the work speaks of their
    average, so that 1 is perfect; tokens of a list are all different.
    """

    name: ClassVar[str] = "induction"
    length: int = 25
    repeats: int = 4
    count: int = 10
    seed: int = 0
    tokens: Sequence[int] | None = None
    first: First = "model"
    copies: Literal["all", "last"] = "all"
    copying: bool = True

    def __post_init__(self) -> None:
        for word, least in (("length", 2), ("repeats", 2), ("count", 1)):
            value = getattr(self, word)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise AttnbiasError(
                    f"InductionHeads({word}) must be a whole number from {least}, got {value!r}."
                )
        if self.copies not in ("all", "last"):
            raise AttnbiasError(f"copies must be 'all' or 'last', got {self.copies!r}.")

    def probes(self, model: nn.Module) -> tuple[Tensor, Tensor, int]:
        """The probes and the controls ``(count, tokens)``, and where their lists begin."""
        source = drawer(
            model, self.tokens, self.first, 1 + self.length * self.repeats, "InductionHeads"
        )
        lists = source.lists(self.count * self.repeats, self.length, self.seed)
        fresh = lists.reshape(self.count, self.repeats * self.length)
        again = fresh[:, : self.length].repeat(1, self.repeats)
        return source.begun(again), source.begun(fresh), source.start

    def targets(self, start: int) -> dict[str, Tensor]:
        """For each query the keys after the earlier copies, and the key before it."""
        total = start + self.length * self.repeats
        at = torch.arange(total)
        block = (at - start) // self.length
        most = 1 if self.copies == "last" else self.repeats - 1
        copy = torch.arange(1, most + 1)
        known = (at[:, None] >= start) & (copy <= block[:, None])
        after = at[:, None] - copy * self.length + 1
        return {
            "after": torch.where(known, after, -1),
            "previous": torch.where(at > start, at - 1, -1)[:, None],
        }

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> Scores:
        if data is not None:
            raise AttnbiasError("InductionHeads makes its own probes: leave data out.")
        tower = text_tower(model, "InductionHeads")
        probes, controls, start = self.probes(model)
        targets = self.targets(start)
        found: list[Tensor] = []
        other: list[Tensor] = []
        previous: list[Tensor] = []
        losses: list[Tensor] | None = []
        steps = range(0, self.count, _BATCH)
        with evaluating(model), bar(len(steps), self.name, progress) as tick:
            for at in steps:
                rows = slice(at, at + _BATCH)
                layers, shown, out = attention_at(model, probes[rows], targets, tower)
                found.append(_mean(shown["after"]))
                previous.append(_mean(shown["previous"]))
                losses = _losses(losses, out, probes[rows])
                only = {"after": targets["after"]}
                other.append(_mean(attention_at(model, controls[rows], only, tower)[1]["after"]))
                tick()
            details: dict[str, Any] = {"previous": gather(previous).nanmean(0)}
            details["copying"] = copying(model, tower) if self.copying else None
        whole = None if losses is None else torch.cat(losses)
        details["losses"] = whole
        details["in_context"] = None if whole is None else self._in_context(whole, start)
        return Scores(self.name, tower, tuple(layers), gather(found), gather(other), details)

    def _in_context(self, losses: Tensor, start: int) -> Tensor:
        """Without the first token of a block: nothing says that the list begins again."""
        last = start + (self.repeats - 1) * self.length
        early = losses[:, start + 1 : start + self.length]
        return losses[:, last + 1 : last + self.length].mean(1) - early.mean(1)


def _mean(found: Tensor) -> Tensor:
    """Summed over the keys of a query, the mean over the queries that have one."""
    there = ~found.isnan().all(-1)
    return torch.where(there, found.nansum(-1), torch.nan).nanmean(-1)


def _losses(before: list[Tensor] | None, out: Any, ids: Tensor) -> list[Tensor] | None:
    logits = getattr(out, "logits", None)
    if before is None or logits is None or logits.shape[:2] != ids.shape:
        return None
    return [*before, next_losses(logits, ids)]
