"""Lookback Lens on a tiny decoder that repeats its context or talks from memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

import attnbias as ab
from attnbias.steer import Loop, Rule, SiteCall
from attnbias.steer.rules import LabelledText, LookbackLens
from experiments._copying import START, Copying, copying
from experiments.common import Experiment

CHUNK, CANDIDATES, LENGTH = 8, 8, 32
FIT, HELD_OUT, PROMPTS = 64, 32, 12


def written(decoder: Copying, rows: int, seed: int, least: int = 1) -> list[LabelledText]:
    """What the decoder itself writes, with stretches of one kind labelled that are long enough."""
    prompts = decoder.prompts(rows, seed)
    torch.manual_seed(seed)
    ids = decoder.model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        top_k=0,
        max_new_tokens=LENGTH,
    )
    return [
        LabelledText({"input_ids": row[None]}, decoder.spans, stretches(kinds, least))
        for row, kinds in zip(ids, decoder.faithful(ids).tolist(), strict=True)
    ]


def stretches(kinds: list[bool], least: int) -> tuple[tuple[int, int, bool], ...]:
    """``(start, stop, faithful)`` of each stretch of tokens of one kind."""
    edges = [0] + [i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]] + [len(kinds)]
    pairs = list(pairwise(edges))
    return tuple((START + a, START + b, kinds[a]) for a, b in pairs if b - a >= least)


@lru_cache(maxsize=8)
def lens(seed: int) -> LookbackLens:
    """The rule, fitted on windows of what the decoder writes."""
    decoder = copying(seed)
    rule = LookbackLens(heads="all", count=CANDIDATES, chunk=CHUNK)
    texts = written(decoder, FIT, 100 + seed)
    return rule.fit(decoder.model, texts, window=CHUNK, progress=False)


def auroc(scores: Tensor, labels: Tensor) -> float:
    """The probability that a faithful part scores above an unfaithful one."""
    above = scores[labels][:, None] - scores[~labels][None]
    return float(((above > 0).double() + 0.5 * (above == 0).double()).mean())


@dataclass(frozen=True, kw_only=True)
class Recorder(Rule):
    """Decodes as the lens does and notes the faithful share of the chosen and of all candidates."""

    heads: str = "all"  # type: ignore[assignment]
    rule: LookbackLens
    decoder: Copying
    notes: list[tuple[float, float]] = field(default_factory=list)

    def look(self, site: SiteCall) -> Tensor:
        return self.rule.look(site)

    def decode(self, loop: Loop) -> None:
        assert self.rule.detector is not None
        detector = self.rule.detector
        while not loop.finished:
            found = loop.candidates(CANDIDATES, CHUNK, sample=True, temperature=0.9, top_p=0.95)
            scores = [float(detector.score(detector.features(self, one.looked))) for one in found]
            shares = [
                float(
                    self.decoder.faithful(torch.cat([loop.tokens[:, :START], one.tokens[None]], 1))
                    .double()
                    .mean()
                )
                for one in found
            ]
            best = scores.index(max(scores))
            self.notes.append((shares[best], sum(shares) / len(shares)))
            loop.append(found[best])


def measure(seed: int) -> Mapping[str, float]:
    """Faithful share of the chunks that the detector chooses, beside all of their candidates."""
    decoder, rule = copying(seed), lens(seed)
    others = written(decoder, HELD_OUT, 200 + seed)
    scores, labels = rule.scores(decoder.model, others, window=CHUNK)
    recorder = Recorder(rule=rule, decoder=decoder)
    prompts = decoder.prompts(PROMPTS, 300 + seed)
    torch.manual_seed(seed)
    with ab.steer(decoder.model, recorder, spans=decoder.spans):
        decoder.model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=LENGTH,
            do_sample=False,
        )
    chosen, every = (sum(part) / len(part) for part in zip(*recorder.notes, strict=True))
    return {"effect": chosen, "control": every, "auroc": auroc(scores, labels)}


EXPERIMENT = Experiment(
    work="lookback-lens",
    claim=(
        "Of 8 sampled chunks of 8 tokens, the one that a detector on look-back ratios prefers "
        "repeats the context more often (share of its tokens); the detector was fitted on windows "
        "of other texts that the same tiny decoder wrote, half from its context, half by heart."
    ),
    control="The mean over the same 8 candidates, that is, a random choice among them.",
    measure=measure,
)
