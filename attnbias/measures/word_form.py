"""Whether a model understands a scrambled word by its letters or by the words around it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.measures.base import Data, Measure, bar, evaluating
from attnbias.measures.embedding import device_of
from attnbias.measures.losses import tower_sites
from attnbias.measures.scores import Scores
from attnbias.measures.typos import Typo, candidates, variants
from attnbias.observe.observer import observe
from attnbias.observe.statistics import Share


@dataclass(frozen=True)
class Formed:
    """What `WordForm` found; the samples are the texts that have a word to scramble.

    Attributes:
        ratios: of scrambling. tower, layers: of the model. words: (intact, then by ratio) of each
            sample.
        similarity: ``(samples, ratios, layers + 1)``, SemRecScore of the embeddings and of each
            layer.
        own, context: ``(samples, ratios, layers, heads)``, attention of the last piece of the
            scrambled word to the pieces of the word, and to all tokens before it.
        divergence: ``(samples, ratios)``, KL in nats of the next-token distributions at the end of
            the text; NaN for a model without a head for words.
    """

    ratios: tuple[float, ...]
    tower: str
    layers: tuple[int, ...]
    words: tuple[tuple[str, ...], ...] = field(repr=False)
    similarity: Tensor = field(repr=False)
    own: Tensor = field(repr=False)
    context: Tensor = field(repr=False)
    divergence: Tensor = field(repr=False)

    @property
    def curve(self) -> Tensor:
        """``(ratios, layers)``: AttentionSelf summed over the heads, mean over the samples."""
        return self.own.nansum(-1).mean(0)

    def scores(self, ratio: float) -> Scores:
        """AttentionSelf of every head at one ratio."""
        samples = self.own[:, self._at(ratio)]
        return Scores("word_form", self.tower, self.layers, samples)

    def form_heads(self, ratio: float) -> Tensor:
        """``(heads,)``: the share of samples in which a head number looks more at the word than at
        what is before it in two layers or more (the authors' code, which counts a number over all
        layers, as if heads of one number belonged together)."""
        more = self.own[:, self._at(ratio)] > self.context[:, self._at(ratio)]
        return (more.sum(1) > 1).double().mean(0)

    def opposed(self, step: float) -> float:
        """NegCorrRate: of the pairs of ratios that lie `step` apart, how many have last-layer
        similarity and divergence move in opposite directions; mean over the samples."""
        pairs = [
            (a, b)
            for a, low in enumerate(self.ratios)
            for b, high in enumerate(self.ratios)
            if abs(high - low - step) < 1e-9
        ]
        if not pairs:
            raise AttnbiasError(f"no two of the ratios {self.ratios} lie {step} apart.")
        low, high = (torch.tensor(side) for side in zip(*pairs, strict=True))
        near = self.similarity[:, low, -1] - self.similarity[:, high, -1]
        far = self.divergence[:, low] - self.divergence[:, high]
        return float((near * far < 0).double().mean())

    def _at(self, ratio: float) -> int:
        if ratio not in self.ratios:
            raise AttnbiasError(f"ratio must be one of {self.ratios}, got {ratio}.")
        return self.ratios.index(ratio)


class _Seen(NamedTuple):
    states: Tensor  # (layers + 1, size), at the last piece of the word
    own: Tensor  # (layers, heads)
    context: Tensor
    logs: Tensor | None  # (vocabulary,), of the token after the text


@dataclass(frozen=True)
class WordForm(Measure):
    r"""A word of each text is scrambled: how much of its meaning comes back, and who looks where.

    .. math:: \mathrm{SemRec}_l = \cos(h_l(\text{intact}), h_l(\text{scrambled})), \qquad
              \mathrm{Self}_{lh} = \sum_{j \in w} p^{lh}_{ij}, \qquad
              \mathrm{Context}_{lh} = \sum_{j < w} p^{lh}_{ij}

    at the last piece i of the word w. The first and the last letter stay, and a contiguous piece of
    the others, as long as the ratio says, is shuffled. The intact word stands in the same context,
    blanks included.

    Args:
        texts: one sample each; one without a word that fits is left out.
        tokenizer: the model's, with offsets (``return_offsets_mapping=True``).
        ratios: shares of the inner letters that are shuffled; 0 leaves the word (0, 0.25, 0.5, 0.75
            and 1 in the paper).
        blank: share of the other words that are replaced by "_" (0 to 1; context integrity).
        letters: a word must have more (10). whole: it must be a single token when intact.
        seed: of the word, the letters and the blanks.
        tower: which one; by default "text", or the only one.

    Returns:
        `Formed`.

    Cost: one forward for each text and ratio and one for the intact text, with one more unbiased
    call a layer.

    Raises:
        AttnbiasError: bad parameters, no text with a word that fits; `data` given.

    Source: Word Form Matters: LLMs' Semantic Reconstruction under Typoglycemia (2025); authors'
    code read. Its texts are questions on contexts of SQuAD; here they are taken as they are.
    """

    name: ClassVar[str] = "word_form"
    texts: tuple[str, ...] = field(repr=False)
    tokenizer: Any = field(repr=False)
    ratios: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    blank: float = 0.0
    letters: int = 10
    whole: bool = True
    seed: int = 0
    tower: str | None = None

    def __post_init__(self) -> None:
        if not self.ratios or not all(0 <= ratio <= 1 for ratio in (*self.ratios, self.blank)):
            raise AttnbiasError(
                f"ratios and blank must lie between 0 and 1, got {self.ratios}, {self.blank}."
            )
        if self.letters < 3:
            raise AttnbiasError(f"letters must be 3 or more, got {self.letters}.")

    def samples(self) -> list[tuple[Typo, list[Typo]]]:
        """Each text that has a word to scramble: intact, and scrambled by each ratio."""
        found = []
        for number, text in enumerate(self.texts):
            dice = random.Random(f"{self.seed}-{number}")
            places = candidates(text, self.tokenizer, self.letters, self.whole)
            if places:
                found.append(variants(text, dice.choice(places), self.ratios, self.blank, dice))
        if not found:
            kind = "a single token when intact, " if self.whole else ""
            raise AttnbiasError(
                f"no text has a word that stands there once, {kind}of more than {self.letters} "
                "letters."
            )
        return found

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> Formed:
        if data is not None:
            raise AttnbiasError("WordForm has its texts in `texts`; give no data.")
        samples, where = self.samples(), tower_sites(model, self.tower)
        tower, layers = where[0].tower, tuple(site.layer for site in where)
        near, own, context, far, words = [], [], [], [], []
        with evaluating(model), torch.no_grad(), bar(len(samples), "texts", progress) as tick:
            for intact, scrambled in samples:
                want = self._seen(model, intact, tower)
                found = [self._seen(model, one, tower) for one in scrambled]
                states = torch.stack([one.states for one in found])
                near.append(nn.functional.cosine_similarity(states, want.states, dim=-1))
                own.append(torch.stack([one.own for one in found]))
                context.append(torch.stack([one.context for one in found]))
                far.append(torch.tensor([_divergence(want.logs, one.logs) for one in found]))
                words.append((intact.word, *(one.word for one in scrambled)))
                tick()
        parts = (torch.stack(part).double() for part in (near, own, context, far))
        return Formed(self.ratios, tower, layers, tuple(words), *parts)

    def _seen(self, model: nn.Module, typo: Typo, tower: str) -> _Seen:
        given = self.tokenizer(typo.text, return_offsets_mapping=True)
        inside = [
            n
            for n, (start, stop) in enumerate(given["offset_mapping"])
            if start < typo.stop and stop > max(typo.start, start)
        ]
        first, last = inside[0], inside[-1]
        device = device_of(model)
        inputs = {
            name: torch.tensor([given[name]], device=device)
            for name in ("input_ids", "attention_mask", "token_type_ids")
            if name in given
        }
        # An empty span before the first token of all cannot be asked for.
        spans = {"own": (first, last + 1), "before": (0, max(first, 1))}
        with observe(model, [Share()], spans=spans, layers={tower: self._layers(model)}) as seen:
            out = model(**inputs, output_hidden_states=True)
        shares = seen.tensor("share", tower).values[0, :, 0, :, last]  # (layers, heads, 2)
        logits = getattr(out, "logits", None)
        states = torch.stack([h[0, last].double().cpu() for h in out.hidden_states])
        logs = None if logits is None else logits[0, -1].double().cpu().log_softmax(-1)
        before = shares[..., 1] if first > 0 else torch.zeros_like(shares[..., 1])
        return _Seen(states, shares[..., 0], before, logs)

    def _layers(self, model: nn.Module) -> list[int]:
        return [site.layer for site in tower_sites(model, self.tower)]


def _divergence(want: Tensor | None, have: Tensor | None) -> float:
    if want is None or have is None:
        return float("nan")
    return float((want.exp() * (want - have)).sum())
