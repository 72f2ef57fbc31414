"""A probe that reads relations between words off all heads together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.measures.base import Data, Measure
from attnbias.measures.head_relations import Relation, baseline, checked_relations
from attnbias.measures.word_maps import Rows, WordMaps, checked_words


@dataclass(frozen=True)
class Probed:
    """What a probe learnt.

    Attributes:
        accuracy: share of the held-out words whose answer it names. hits: ``(words,)`` booleans.
        train_accuracy: the same on the words it was fitted on.
        to, back: ``(layers, heads[, 2 * size])``: the weights of the attention from the word to the
            candidate, and of that from the candidate to the word.
        baseline: accuracy on the held-out words of the fixed offset that is best for the others.
    """

    accuracy: float
    hits: Tensor
    train_accuracy: float
    to: Tensor
    back: Tensor
    baseline: float


@dataclass(frozen=True)
class AttentionProbe(Measure):
    r"""A log-linear probe over the attention of all heads, in both directions.

    .. math:: p(i \mid j) \propto \exp \sum_k \big( w_k\, A^k_{ij} + u_k\, A^k_{ji} \big)

    is the probability that word i is the answer for word j (its syntactic head), over all other
    words i; A are the word maps of head k. With word vectors (GloVe in the paper) the weights
    depend on the two words: :math:`w_k = W_k\, [v_i; v_j]`, :math:`u_k = U_k\, [v_i; v_j]`. The
    model is fixed; only w and u are fitted.

    Args:
        words, relations: as in `HeadRelations`; of several answers any counts as right.
        vectors: for each row ``(words, size)``; None: the weights are the same for all words.
        train: share of the rows (the first of them) that the probe is fitted on.
        decay: of the squared weights, beside the mean negative log-likelihood.
        steps: iterations of L-BFGS at most.
        tower: which one; by default "text", or the only one.

    Returns:
        `Probed`.

    Cost: that of `WordMaps`, and a convex fit of 2 numbers a head (times 2 * size with vectors).

    Raises:
        AttnbiasError: rows that do not fit, nothing to fit or to hold out.

    Source: What Does BERT Look At? An Analysis of BERT's Attention (2019, arXiv 1906.04341),
    section 5; equations and authors' code read. The optimiser and the penalty are chosen here.
    """

    name: ClassVar[str] = "attention_probe"
    words: Rows = field(repr=False)
    relations: tuple[tuple[Relation, ...], ...] = field(repr=False)
    vectors: tuple[Tensor, ...] | None = field(default=None, repr=False)
    train: float = 0.5
    decay: float = 1e-4
    steps: int = 200
    tower: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", checked_words(self.words))
        object.__setattr__(self, "relations", checked_relations(self.words, self.relations))
        if self.vectors is not None:
            sizes = [tuple(v.shape[:1]) for v in self.vectors]
            if sizes != [(max(row) + 1,) for row in self.words]:
                raise AttnbiasError("vectors must have one (words, size) for each row of words.")
        if self.decay < 0 or self.steps < 1:
            raise AttnbiasError(f"decay from 0, steps from 1; got {self.decay}, {self.steps}.")

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> Probed:
        found = WordMaps(self.words, self.tower).measure(model, data, progress=progress)
        cut = round(self.train * len(self.words))
        parts = ([], [])  # type: tuple[list[tuple[int, int, tuple[int, ...]]], ...]
        for row, related in enumerate(self.relations):
            parts[row >= cut].extend((row, word, answers) for word, answers, _ in related)
        if not parts[0] or not parts[1]:
            raise AttnbiasError(
                f"train={self.train} leaves {len(parts[0])} words to fit on and {len(parts[1])} to "
                "hold out; both must be some."
            )
        shape = found.maps[0].shape[:2]
        size = 1 if self.vectors is None else 2 * self.vectors[0].shape[-1]
        weights = torch.zeros(2, size, shape.numel(), dtype=torch.float64, requires_grad=True)
        known = [[self._features(found.maps[r], r, w) for r, w, _ in part] for part in parts]
        with torch.enable_grad():
            self._fit(weights, known[0], parts[0])
        weights = weights.detach()
        hits = [
            torch.tensor(
                [int(_scores(weights, f).argmax()) in a for f, (_, _, a) in zip(k, p, strict=True)]
            )
            for k, p in zip(known, parts, strict=True)
        ]
        best = baseline(self.words, parts[0])["best offset"]
        fixed = baseline(self.words, parts[1])["offsets"][best]
        to, back = weights.transpose(1, 2).reshape(2, *shape, size)
        if self.vectors is None:
            to, back = to[..., 0], back[..., 0]
        means = [float(hit.double().mean()) for hit in hits]
        return Probed(means[1], hits[1], means[0], to, back, fixed)

    def _features(self, table: Tensor, row: int, word: int) -> tuple[Tensor, Tensor | None, int]:
        """(2, heads, words) attention from and to a word; (words, size) of the pair; the word."""
        flat = table.flatten(0, 1).nan_to_num(0.0)
        pair = None
        if self.vectors is not None:
            own = self.vectors[row].double()
            pair = torch.cat([own, own[word].expand_as(own)], -1)
        return torch.stack([flat[:, word], flat[:, :, word]]), pair, word

    def _fit(
        self,
        weights: Tensor,
        known: list[tuple[Tensor, Tensor | None, int]],
        items: list[tuple[int, int, tuple[int, ...]]],
    ) -> None:
        optimizer = torch.optim.LBFGS(
            [weights], max_iter=self.steps, line_search_fn="strong_wolfe", tolerance_grad=1e-9
        )

        most = max(attention.shape[-1] for attention, _, _ in known)
        wide = [most - attention.shape[-1] for attention, _, _ in known]
        pad = nn.functional.pad
        attention = torch.stack([pad(a, (0, w)) for (a, _, _), w in zip(known, wide, strict=True)])
        pairs = [
            pad(p, (0, 0, 0, w)) for (_, p, _), w in zip(known, wide, strict=True) if p is not None
        ]
        pair = torch.stack(pairs) if pairs else attention.new_ones(len(known), most, 1)
        hidden = torch.zeros(len(known), most, dtype=torch.bool)
        right = torch.zeros_like(hidden)
        for n, (more, (_, word, answers)) in enumerate(zip(wide, items, strict=True)):
            hidden[n, most - more :] = True
            hidden[n, word] = True
            right[n, list(answers)] = True

        def closure() -> Tensor:
            optimizer.zero_grad()
            each = torch.einsum("dsk,ndkw->nws", weights, attention)
            logs = (each * pair).sum(-1).masked_fill(hidden, -1e30).log_softmax(-1)
            found = logs.masked_fill(~right, -torch.inf).logsumexp(-1)
            loss = self.decay * weights.square().sum() - found.mean()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]


def _scores(weights: Tensor, features: tuple[Tensor, Tensor | None, int]) -> Tensor:
    """``(words,)``: the score of every candidate, -inf for the word itself."""
    attention, pair, word = features
    each = torch.einsum("dsk,dkw->sw", weights, attention)
    found = each[0] if pair is None else (pair.T * each).sum(0)
    own = torch.arange(len(found)) == word
    return found.masked_fill(own, -torch.inf)
