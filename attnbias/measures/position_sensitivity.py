"""Whether a text encoder finds evidence wherever in a document it stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.measures.base import Data, Measure, bar, evaluating
from attnbias.measures.embedding import (
    Pooling,
    check_pooling,
    device_of,
    last_states,
    pooled,
    tokens,
)
from attnbias.measures.position_curve import PositionCurve, position_curve


@dataclass(frozen=True)
class Retrieval:
    """Queries, documents, and where in which document the evidence for each query stands.

    Args:
        queries: texts. documents: texts, all of them searched for every query.
        positives: for each query the number of the document that answers it.
        spans: for each query (start, stop), the characters of the evidence in that document.
        groups: queries that belong together (one fact at many places) share a number; the intervals
            draw them together. By default every query is by itself.

    Raises:
        AttnbiasError: sizes that do not fit, a document or a span that does not exist.
    """

    queries: tuple[str, ...] = field(repr=False)
    documents: tuple[str, ...] = field(repr=False)
    positives: tuple[int, ...] = field(repr=False)
    spans: tuple[tuple[int, int], ...] = field(repr=False)
    groups: tuple[int, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        sizes = [len(self.queries), len(self.positives), len(self.spans)]
        sizes += [] if self.groups is None else [len(self.groups)]
        if len(set(sizes)) != 1 or not self.queries:
            raise AttnbiasError(
                "queries, positives, spans (and groups) must be as many, and at least one; got "
                f"{', '.join(map(str, sizes))}."
            )
        for number, (at, (start, stop)) in enumerate(zip(self.positives, self.spans, strict=True)):
            if not 0 <= at < len(self.documents):
                raise AttnbiasError(f"positives[{number}] is {at}: there is no such document.")
            if not 0 <= start <= stop <= len(self.documents[at]) or not self.documents[at]:
                raise AttnbiasError(
                    f"spans[{number}] is {(start, stop)}, and document {at} has "
                    f"{len(self.documents[at])} characters."
                )

    @property
    def relative(self) -> Tensor:
        """``(queries,)``: the middle of the evidence by the document's characters, 0 to 1."""
        found = [
            (start + stop) / 2 / len(self.documents[at])
            for at, (start, stop) in zip(self.positives, self.spans, strict=True)
        ]
        return torch.tensor(found, dtype=torch.float64).clamp(0, 1)


@dataclass(frozen=True)
class Sensitivity:
    """What `PositionSensitivity` found.

    Attributes:
        scores: ``(queries,)``, nDCG of each. relative: ``(queries,)``, where its evidence stands.
        lengths: ``(queries,)``, tokens of its document. curves: by the length of the documents, and
            "all".
    """

    scores: Tensor
    relative: Tensor
    lengths: Tensor
    curves: dict[str, PositionCurve]

    def __str__(self) -> str:
        return "\n".join(f"documents of {name} tokens: {c}" for name, c in self.curves.items())


@dataclass(frozen=True)
class PositionSensitivity(Measure):
    r"""How a dense retriever's nDCG@10 depends on where in the document the evidence stands.

    .. math:: \mathrm{nDCG@}k = \frac{[r \le k]}{\log_2(1 + r)}

    with :math:`r` the rank of the one relevant document by the cosine of pooled last states; of
    equal documents the earlier number is first. Each query's score goes to the bin of the relative
    position of its evidence, and the bins make a `PositionCurve` for each bucket of document
    lengths.

    Args:
        retrieval: what is to be found.
        tokenizer: the model's: ``tokenizer(texts, padding=True, return_tensors="pt")``.
        pooling: "mean" of the real tokens, "first" or "last" real token; as the model was trained.
        limit: tokens at which a text is cut; None never cuts. A cut document has lost its end:
            its length still counts whole.
        edges: upper ends of the buckets of document lengths, in tokens (512, 1024, 1536 in the
            paper); one more bucket lies above. Empty buckets have no curve.
        bins: of relative position (20). depth: k (10). draws, confidence, seed: of the intervals.
        batch: texts in one forward.

    Returns:
        `Sensitivity`.

    Cost: one forward for each document and query; queries times documents cosines.

    Raises:
        AttnbiasError: bad parameters; `data` given (the texts are in `retrieval`).

    Source: PosIR: Position-Aware Heterogeneous Information Retrieval Benchmark (2026); authors'
    code read. Its data sets are not part of this library. Intervals and chance are ours.
    """

    name: ClassVar[str] = "position_sensitivity"
    retrieval: Retrieval
    tokenizer: Any = field(repr=False)
    pooling: Pooling = "mean"
    limit: int | None = None
    edges: tuple[int, ...] = (512, 1024, 1536)
    bins: int = 20
    depth: int = 10
    draws: int = 1000
    confidence: float = 0.95
    seed: int = 0
    batch: int = 16

    def __post_init__(self) -> None:
        check_pooling(self.pooling)
        if self.depth < 1 or self.batch < 1 or list(self.edges) != sorted(set(self.edges)):
            raise AttnbiasError(
                "depth and batch must be 1 or more and edges must rise, got "
                f"{self.depth}, {self.batch}, {self.edges}."
            )

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> Sensitivity:
        if data is not None:
            raise AttnbiasError("PositionSensitivity has its texts in `retrieval`; give no data.")
        given = self.retrieval
        total = len(given.documents) + len(given.queries)
        with evaluating(model), torch.no_grad(), bar(total, "texts encoded", progress) as tick:
            documents = self._vectors(model, given.documents, tick)
            queries = self._vectors(model, given.queries, tick)
        scores = ndcg(queries @ documents.T, torch.tensor(given.positives), self.depth)
        known = {
            n: len(self.tokenizer(given.documents[n])["input_ids"]) for n in set(given.positives)
        }
        lengths = torch.tensor([known[n] for n in given.positives])
        names = [f"up to {edge}" for edge in self.edges] + [f"over {(0, *self.edges)[-1]}"]
        bucket = torch.bucketize(lengths, torch.tensor(self.edges, dtype=torch.long))
        curves = {}
        for number, name in enumerate([*names, "all"]):
            keep = bucket == number if name != "all" else torch.ones_like(bucket, dtype=torch.bool)
            if bool(keep.any()):
                curves[name] = self._curve(scores, keep)
        return Sensitivity(scores, given.relative, lengths, curves)

    def _curve(self, scores: Tensor, keep: Tensor) -> PositionCurve:
        groups = self.retrieval.groups
        return position_curve(
            self.retrieval.relative[keep],
            scores[keep],
            bins=self.bins,
            groups=None if groups is None else torch.tensor(groups)[keep],
            draws=self.draws,
            confidence=self.confidence,
            seed=self.seed,
        )

    def _vectors(self, model: nn.Module, texts: Sequence[str], tick: Any) -> Tensor:
        """``(texts, size)`` float64; texts of like length share a forward."""
        order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
        found: dict[int, Tensor] = {}
        for start in range(0, len(order), self.batch):
            part = order[start : start + self.batch]
            inputs = tokens(self.tokenizer, [texts[n] for n in part], self.limit, device_of(model))
            states = last_states(model, inputs)
            vectors = pooled(states, inputs["attention_mask"], self.pooling).double().cpu()
            for number, vector in zip(part, vectors, strict=True):
                found[number] = vector
                tick()
        return torch.stack([found[n] for n in range(len(texts))])


def ndcg(similar: Tensor, positives: Tensor, depth: int) -> Tensor:
    """``(queries,)``: nDCG with one relevant document, from similarities (queries, documents)."""
    own = similar.gather(1, positives[:, None])
    earlier = torch.arange(similar.shape[1]) < positives[:, None]
    rank = 1 + (similar > own).sum(1) + ((similar == own) & earlier).sum(1)
    found: Tensor = 1 / torch.log2(1 + rank.double())
    return torch.where(rank <= depth, found, 0.0)
