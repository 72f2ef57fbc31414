"""RetrievalHeads: the heads that copy a needle out of a long context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.measures.base import Data, HeadMeasure, bar, evaluating, forwards
from attnbias.measures.scores import Scores, gather
from attnbias.measures.texts import longer, text_rows
from attnbias.steer.rule import Heads, Rule
from attnbias.steer.site import SiteCall

NEEDLE, ANSWER = "needle", "answer"


@dataclass(frozen=True, kw_only=True)
class _Tops(Rule):
    """Keeps where the queries from `start` on attend most, and changes nothing."""

    heads: Heads = "all"
    start: int = 0
    found: dict[int, Tensor] = field(default_factory=dict)

    def look(self, site: SiteCall) -> bool:
        rows = (site.query_positions[0] >= self.start).nonzero()[:, 0]
        best = site.attention(rows[None])[0].argmax(-1)  # (heads, rows)
        self.found[site.site.layer] = site.key_positions[0][best]
        return True


@dataclass(frozen=True)
class RetrievalHeads(HeadMeasure):
    r"""How much of a needle each head copies while the model says it again.

    .. math:: \mathrm{score}_h = \frac{|g_h \cap k|}{|k|}, \qquad
        w \in g_h \iff x_{j^*} = w,\ j^* = \arg\max_j p^h_{ij} \in \text{needle}

    where i is the query that says token w and k the tokens of the needle: a head copies a token
    when its largest attention falls on that very token inside the needle. Samples are trials.

    Data: forwards of prompts with one more entry, ``"needle"``: ``(start, stop)`` or one such pair
    for each row, where the needle's answer stands, in token positions. The model answers by greedy
    decoding; with an entry ``"answer"`` (token numbers ``(rows, count)``) that answer is read
    instead, in one forward. Rows run one by one, without padding.

    Args:
        count: "distinct": different tokens of the needle, the equation above, as in the paper;
            "steps": every step that copies counts ``1 / needle length``, as in the released code.
        least: a trial counts where the answer holds more than this share of the needle's tokens
            (with repeats); published 0.5 (ROUGE-1 recall over 50). None: every trial counts. A
            given answer always counts.
        steps: tokens decoded at most; 50 in the released code.

    Returns:
        `Scores`, NaN in trials that do not count; published: a head above 0.1 is a retrieval head
        (``scores.above(0.1)``), under 5 % of all. details: ``"recall"`` ``(trials,)`` and
        ``"kept"``.

    Cost: greedy decoding and one forward with the answer's rows of attention for each trial.

    Raises:
        AttnbiasError: forwards without a needle, or a needle outside of the text.
        Refused: several towers of text (encoder-decoders).

    Source: Retrieval Head Mechanistically Explains Long-Context Factuality, 2024 (arXiv
    2404.15574); authors' code read. Published trials: 3 needles, 20 lengths from 1,000 to 50,000
    tokens, 10 depths (`haystacks` cuts such a grid). Departs: the recall is one of tokens, not of
    stemmed words, and the answer is read in one more forward after the decoding, which gives the
    same rows of attention.
    """

    name: ClassVar[str] = "retrieval"
    count: Literal["distinct", "steps"] = "distinct"
    least: float | None = 0.5
    steps: int = 50

    def __post_init__(self) -> None:
        if self.count not in ("distinct", "steps"):
            raise AttnbiasError(f"count must be 'distinct' or 'steps', got {self.count!r}.")
        if self.least is not None and not 0 <= self.least < 1:
            raise AttnbiasError(f"least must be None or from 0 to below 1, got {self.least!r}.")
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise AttnbiasError(f"steps must be a whole number from 1, got {self.steps!r}.")

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> Scores:
        from attnbias.steer.states import tower_of

        given = forwards(data, "RetrievalHeads")
        trials = [trial for forward in given for trial in _trials(forward)]
        with evaluating(model), torch.no_grad(), bar(len(trials), self.name, progress) as tick:
            tower = tower_of(_Tops(), model, prefer="text")
            parts, recalls, layers = [], [], []
            for prompt, needle, answer in trials:
                said = self._answer(model, prompt) if answer is None else answer
                tokens = prompt["input_ids"][0]
                inside = tokens[needle[0] : needle[1]]
                share = _recall(said.tolist(), inside.tolist())
                tops = _tops(model, prompt, said, tower)
                layers = sorted(tops)
                score = torch.stack([self._score(tops[n], needle, tokens, said) for n in layers])
                counts = answer is not None or self.least is None or share > self.least
                parts.append((score if counts else torch.full_like(score, torch.nan))[None])
                recalls.append(share)
                tick()
        samples = gather([part.cpu() for part in parts])
        kept = [not bool(sample.isnan().all()) for sample in samples]
        details = {"recall": torch.tensor(recalls, dtype=torch.float64), "kept": kept}
        return Scores(self.name, tower, tuple(layers), samples, details=details)

    def _answer(self, model: nn.Module, prompt: Mapping[str, Any]) -> Tensor:
        length = prompt["input_ids"].shape[1]
        speaker: Any = model
        if not hasattr(speaker, "generate"):
            raise AttnbiasError(
                f"RetrievalHeads needs a model that generates, got {type(model).__name__}; or give "
                "an 'answer'."
            )
        config = speaker.generation_config
        known = [n for n in (config.pad_token_id, config.eos_token_id) if isinstance(n, int)]
        options = {"do_sample": False, "num_beams": 1, "max_new_tokens": self.steps}
        out = speaker.generate(**prompt, **options, pad_token_id=known[0] if known else 0)
        said: Tensor = out[0, length:]
        return said

    def _score(self, at: Tensor, needle: tuple[int, int], tokens: Tensor, said: Tensor) -> Tensor:
        """(heads,): of one layer, from the positions ``(heads, steps)`` attended to most."""
        start, stop = needle
        inside = (at >= start) & (at < stop)
        hit = inside & (tokens[at.clamp(0, len(tokens) - 1)] == said)
        if self.count == "steps":
            return hit.double().sum(-1) / (stop - start)
        words = torch.unique(tokens[start:stop])
        copied: Tensor = (hit[..., None] & (said[:, None] == words)).any(1)
        return copied.double().mean(-1)


def _trials(
    forward: Mapping[str, Any],
) -> list[tuple[dict[str, Any], tuple[int, int], Tensor | None]]:
    """Prompt, needle and given answer of each row of a forward."""
    if NEEDLE not in forward:
        raise AttnbiasError(
            "RetrievalHeads needs forwards with a needle: {'input_ids': ..., 'needle': (start, "
            "stop)}."
        )
    plain = {word: value for word, value in forward.items() if word not in (NEEDLE, ANSWER)}
    rows = text_rows(plain, "RetrievalHeads")
    spans, answers = forward[NEEDLE], forward.get(ANSWER)
    pairs = [spans] * len(rows) if isinstance(spans, tuple) else list(spans)
    if len(pairs) != len(rows) or (answers is not None and len(answers) != len(rows)):
        raise AttnbiasError(
            f"RetrievalHeads: {len(rows)} rows need as many needles (and answers), got "
            f"{len(pairs)} needles."
        )
    found = []
    for number, (row, (start, stop)) in enumerate(zip(rows, pairs, strict=True)):
        length = row["input_ids"].shape[1]
        if not 0 <= start < stop <= length:
            raise AttnbiasError(
                f"a needle must be (start, stop) inside of its {length} tokens, got {start, stop}."
            )
        said = None if answers is None else torch.as_tensor(answers[number]).to(row["input_ids"])
        found.append((row, (int(start), int(stop)), said))
    return found


def _tops(
    model: nn.Module, prompt: Mapping[str, Any], said: Tensor, tower: str
) -> dict[int, Tensor]:
    """By layer, the positions ``(heads, steps)`` that the queries which say the answer look at."""
    from attnbias.steer.context import steer

    reader = _Tops(start=prompt["input_ids"].shape[1] - 1, towers=(tower,))
    with steer(model, reader):
        model(**longer(prompt, said[None, :-1]))
    return dict(reader.found)


def _recall(said: list[int], needle: list[int]) -> float:
    """The share of the needle's tokens, with repeats, that the answer holds."""
    return sum(min(said.count(n), needle.count(n)) for n in set(needle)) / len(needle)


def haystacks(
    text: Tensor,
    needle: Tensor,
    question: Tensor,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    begin: Tensor | None = None,
    stop: int | None = None,
) -> list[dict[str, Any]]:
    """Prompts for `RetrievalHeads`: a needle at several depths of texts of several lengths.

    Args:
        text: tokens ``(count,)`` of the haystack, at least as many as the longest prompt needs.
        needle: tokens of the needle. question: tokens put last.
        lengths: tokens of the whole prompt; published 20 from 1,000 to 50,000.
        depths: where the needle stands, 0 (first) to 1 (last); published 10.
        begin: tokens put first. stop: the token that ends a sentence; the needle moves back to
            stand right after one, as in the released code. None: it stands anywhere.

    Raises:
        AttnbiasError: a length that the text cannot fill.
    """
    start = needle.new_empty(0) if begin is None else begin
    found = []
    for length in lengths:
        size = length - len(needle) - len(question) - len(start)
        if not 0 <= size <= len(text):
            raise AttnbiasError(
                f"haystacks: a prompt of {length} tokens needs {size} of the text's {len(text)}."
            )
        for depth in depths:
            if not 0 <= depth <= 1:
                raise AttnbiasError(f"depths must be from 0 to 1, got {depth!r}.")
            at = round(depth * size)
            while stop is not None and 0 < at < size and int(text[at - 1]) != stop:
                at -= 1
            parts = [start, text[:at], needle, text[at:size], question]
            first = len(start) + at
            span = (first, first + len(needle))
            found.append({"input_ids": torch.cat(parts)[None], NEEDLE: span})
    return found
