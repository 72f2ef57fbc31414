"""Temporal heads: those that stand in the circuits of facts of a time and in no other circuit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.measures.base import Data, HeadMeasure, bar, evaluating, forwards
from attnbias.measures.edge_attribution import Edge, edges
from attnbias.measures.probes import text_tower
from attnbias.measures.scores import Head, Scores

_PARTS = ("clean", "corrupted", "answer", "wrong")


@dataclass(frozen=True)
class TemporalHeads(HeadMeasure):
    r"""In which share of the circuits of one time each head stands, where no other circuit has it.

    For every relation and time, and for facts that hold at all times, edges are scored by EAP-IG
    (`measures.edge_attribution.edges`) over pairs of a clean prompt and a corrupted one: the same
    subject at another time, or another subject for facts without time. The circuit is the `edges`
    largest in absolute score without dead ends, then those with a score of at least `threshold`.

    .. math:: \mathrm{score}_h = \max_t \frac{|\{c \in C_t : h \in c\}|}{|C_t|}
        \ \text{if no circuit without time has } h, \text{ else } 0

    Data: one mapping for each circuit: ``"clean"`` and ``"corrupted"``, forwards of as many tokens
    whose rows are pairs; ``"answer"`` and ``"wrong"``, the first tokens of the two objects
    ``(rows,)``; ``"time"``, a word or number, None for facts without time.

    Args:
        steps: of the integrated gradients; published 100. edges: published 5,000.
        threshold: published 0.1 (of logits).
        share: a head is temporal from this share of the circuits of some time; published 0.9.

    Returns:
        `Scores` with one sample. details: ``"temporal"``, the heads with at least `share`;
        ``"circuits"``, for each of `data` a mapping of edge to mean score after the cuts;
        ``"membership"`` ``(circuits, layers, heads)``.

    Cost: for each circuit `steps` forwards and backwards, and as many products of all pairs of
    nodes, each O(tokens size): for small models.

    Raises:
        AttnbiasError: data of another form, or without both kinds of facts.
        Refused: a model whose layers are not known to add to one stream (see `edges`).

    Source: Does Time Have Its Place? Temporal Heads: Where Language Models Recall Time-specific
    Information, 2025 (arXiv 2502.14258); its graph code read, the notebooks by a summary. EAP-IG is
    that of Have Faith in Faithfulness, 2024 (code read). Departs: the gap is that of two logits,
    scores are positive where they carry the answer.
    """

    name: ClassVar[str] = "temporal"
    steps: int = 100
    edges: int = 5000
    threshold: float = 0.1
    share: float = 0.9

    def __post_init__(self) -> None:
        for word in ("steps", "edges"):
            value = getattr(self, word)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise AttnbiasError(f"{word} must be a whole number from 1, got {value!r}.")
        if not 0 < self.share <= 1:
            raise AttnbiasError(f"share must be above 0 and at most 1, got {self.share!r}.")
        if not (isinstance(self.threshold, (int, float)) and math.isfinite(self.threshold)):
            raise AttnbiasError(f"threshold must be a number, got {self.threshold!r}.")

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> Scores:
        given = forwards(data, "TemporalHeads")
        for circuit in given:
            _check(circuit)
        times = [circuit["time"] for circuit in given]
        if all(time is None for time in times) or None not in times:
            raise AttnbiasError(
                "TemporalHeads: data must hold circuits of a time and some without (time None)."
            )
        tower = text_tower(model, "TemporalHeads")
        found = []
        with evaluating(model), bar(len(given), self.name, progress) as tick:
            for circuit in given:
                scores = edges(model, circuit, steps=self.steps, tower=tower)
                kept = {edge: float(each.mean()) for edge, each in scores.items()}
                found.append((kept, self.cut(kept)))
                tick()
        shape = _shape([whole for whole, _ in found])
        inside = torch.stack([_members(cut, shape) for _, cut in found])
        values = self._score(inside, times)
        heads = [(int(n), int(h)) for n, h in (values >= self.share).nonzero()]
        details = {
            "temporal": tuple(heads),
            "circuits": [cut for _, cut in found],
            "membership": inside,
        }
        layers = tuple(range(shape[0]))
        return Scores(self.name, tower, layers, values[None].double(), details=details)

    def cut(self, scores: Mapping[Edge, float]) -> dict[Edge, float]:
        """The circuit: the largest edges without dead ends, then those above the threshold."""
        order = sorted(scores, key=lambda edge: -abs(scores[edge]))
        kept = set(order[: self.edges])
        while True:
            writes = {parent for parent, _ in kept} | {"logits"}
            reads = {_node(child) for _, child in kept} | {"input"}
            live = {e for e in kept if _node(e[1]) in writes and e[0] in reads}
            if live == kept:
                break
            kept = live
        return {edge: scores[edge] for edge in order if edge in kept and self._large(scores[edge])}

    def _large(self, score: float) -> bool:
        return score >= self.threshold

    def _score(self, inside: Tensor, times: Sequence[Any]) -> Tensor:
        always = torch.stack([m for m, time in zip(inside, times, strict=True) if time is None])
        shares = []
        for time in dict.fromkeys(time for time in times if time is not None):
            of = [m for m, other in zip(inside, times, strict=True) if other == time]
            shares.append(torch.stack(of).double().mean(0))
        return torch.stack(shares).amax(0) * ~always.any(0)


def _node(child: str) -> str:
    return child.split("<")[0]


def _head(node: str) -> Head | None:
    if not node.startswith("a"):
        return None
    layer, head = _node(node)[1:].split(".h")
    return int(layer), int(head)


def _shape(scores: Sequence[Mapping[Edge, float]]) -> tuple[int, int]:
    heads = [head for each in scores for edge in each if (head := _head(edge[1])) is not None]
    return max(n for n, _ in heads) + 1, max(h for _, h in heads) + 1


def _members(circuit: Mapping[Edge, float], shape: tuple[int, int]) -> Tensor:
    """``(layers, heads)`` booleans: the heads at an end of some edge."""
    found = torch.zeros(shape, dtype=torch.bool)
    for edge in circuit:
        for node in edge:
            head = _head(node)
            if head is not None:
                found[head] = True
    return found


def _check(circuit: Mapping[str, Any]) -> None:
    missing = [part for part in (*_PARTS, "time") if part not in circuit]
    if missing:
        raise AttnbiasError(
            f"TemporalHeads: a circuit needs {', '.join((*_PARTS, 'time'))}; "
            f"{', '.join(missing)} is missing."
        )
    for part in ("clean", "corrupted"):
        if not isinstance(circuit[part], Mapping) or "input_ids" not in circuit[part]:
            raise AttnbiasError(f"TemporalHeads: {part} must be a forward with input_ids.")
    rows = len(circuit["clean"]["input_ids"])
    if any(len(circuit[part]) != rows for part in ("answer", "wrong")):
        raise AttnbiasError(f"TemporalHeads: answer and wrong need {rows} tokens, one a row.")
