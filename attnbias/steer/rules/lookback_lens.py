"""LookbackLens: a detector on look-back ratios, and decoding that follows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from attnbias.errors import AttnbiasError, Refused
from attnbias.steer.lookback import Detector, LabelledText, examples, logistic, ratios
from attnbias.steer.loop import Loop
from attnbias.steer.rule import Heads, Rule, is_number
from attnbias.steer.scoring import bar
from attnbias.steer.site import SiteCall
from attnbias.steer.spans import Keys, keys_of


@dataclass(frozen=True, kw_only=True)
class LookbackLens(Rule):
    r"""Sample several chunks, keep the one that looks back at the context like faithful text does.

    .. math:: v^{lh}_t = \frac{A^{lh}_t(\text{context})}{A^{lh}_t(\text{context}) +
              A^{lh}_t(\text{new})}, \qquad F(\bar v) = \sigma(w \cdot \bar v + b)

    with A the mean attention per token, v averaged over the tokens of a chunk. Each chunk is the
    one of `count` samples with the highest F.

    Args:
        detector: F, from `fit` (or from another rule); None until then.
        context: the context; every token after it counts as new (so also the question, where it
            comes after; published: the context ends before the header of the response).
        count: candidates, published 8. chunk: its tokens, published 8.
        temperature, top_p: of the samples, published 0.9 and 0.95; None: as the call asks.
        heads, layers, towers: which heads are features; all in the paper.

    Cost: `count` rows are decoded instead of one; one row of attention per head and token.

    Raises:
        Refused: steering without a detector.

    Source: Lookback Lens: Detecting and Mitigating Contextual Hallucinations in Large Language
    Models Using Only Attention Maps, 2024 (arXiv 2407.07071); authors' code read. The public code
    has 5 tokens as the default of a chunk, the paper's experiments use 8. Left out: the transfer
    of a detector to another model by a linear map between head features.
    """

    heads: Heads
    detector: Detector | None = None
    context: Keys = ("context",)
    count: int = 8
    chunk: int = 8
    temperature: float | None = 0.9
    top_p: float | None = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "context", keys_of(self.context))
        for name in ("count", "chunk"):
            value = getattr(self, name)
            if not is_number(value) or value < 1:
                raise AttnbiasError(f"{name} must be a whole number from 1, got {value!r}.")
        if self.temperature is not None and not self.temperature > 0:
            raise AttnbiasError(f"temperature must be above 0 or None, got {self.temperature!r}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise AttnbiasError(f"top_p must be above 0 and at most 1, got {self.top_p!r}.")
        if self.phase != "both":
            raise AttnbiasError(f"phase must be 'both' for LookbackLens, got {self.phase!r}.")

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(key for key in self.context if isinstance(key, str))

    def ready(self) -> None:
        if self.detector is None:
            raise Refused(
                "LookbackLens has no detector yet: run rule = LookbackLens(heads=...).fit(model, "
                "texts), or write LookbackLens(detector=..., heads=...)."
            )

    def look(self, site: SiteCall) -> Tensor:
        """The ratios ``(batch, heads, 1)`` of the last token (of every token in a fit)."""
        return ratios(site, self.context, every="every" in site.state)

    def decode(self, loop: Loop) -> None:
        self.ready()
        assert self.detector is not None
        while not loop.finished:
            found = loop.candidates(
                self.count,
                self.chunk,
                sample=True,
                temperature=self.temperature,
                top_p=self.top_p,
            )
            logits = [
                float(self.detector.logit(self.detector.features(self, one.looked)))
                for one in found
            ]
            loop.append(found[logits.index(max(logits))])

    def fit(
        self,
        model: nn.Module,
        texts: Sequence[LabelledText],
        *,
        window: int | None = None,
        progress: bool = True,
    ) -> LookbackLens:
        """The rule with a detector fitted on labelled text; it is ready.

        Args:
            model: in eval mode; it is left as it is.
            texts: texts with faithful and unfaithful parts.
            window: None: one example per labelled part, its ratios averaged. Else every window of
                so many labelled tokens (published 8), faithful where all its tokens are.
            progress: show a bar (needs rich; silent without it).

        Cost: one forward per text. Logistic regression by scikit-learn (max_iter 1000).

        Raises:
            AttnbiasError: no texts, labels outside the text, one kind of label only.
            Refused: scikit-learn is not installed.
        """
        if model.training:
            raise AttnbiasError("fit needs the model in eval mode: write model.eval() first.")
        if window is not None and (not is_number(window) or window < 1):
            raise AttnbiasError(f"window must be None or a whole number from 1, got {window!r}.")
        with bar(len(texts), progress, "LookbackLens") as tick:
            features, labels, places = examples(self, model, texts, window, tick)
        weights, intercept = logistic(features, labels)
        found = Detector(places, weights, intercept, len(labels), window)
        return replace(self, detector=found)

    def scores(
        self, model: nn.Module, texts: Sequence[LabelledText], *, window: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The detector's probability for each part (or window) of texts, and the labels."""
        self.ready()
        assert self.detector is not None
        features, labels, places = examples(self, model, texts, window)
        if places != self.detector.places:
            raise AttnbiasError("the detector was fitted on other heads or another model.")
        return self.detector.score(features), labels
