"""GAME on a tiny decoder: the edit along the gradient beside a random edit of the same norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import mean

import torch
from torch import Tensor

import attnbias as ab
from attnbias.bias import Bias
from attnbias.steer import Candidate, Loop, Rule, SiteCall
from attnbias.steer.rules import GAME, LookbackLens
from experiments._copying import START, Copying, copying
from experiments.common import Experiment
from experiments.lookback_lens import CHUNK, FIT, LENGTH, written

PROMPTS, DRAWS = 16, 4
STRETCH = 4  # tokens of one kind that are labelled
STEP = 0.3  # of the ratios of 8 heads
Gain = tuple[float, float]  # of the detector's logit, of the faithful share


@dataclass(frozen=True, kw_only=True)
class Recorder(Rule):
    """Redoes each chunk that scores low under several edits, notes their gains, keeps GAME's."""

    heads: str = "all"  # type: ignore[assignment]
    rule: GAME
    decoder: Copying
    notes: list[tuple[Gain, Gain, Gain]] = field(default_factory=list)  # GAME, random, uniform

    def look(self, site: SiteCall) -> Tensor:
        return self.rule.look(site)

    def bias(self, site: SiteCall) -> Bias | None:
        return self.rule.bias(site)

    def decode(self, loop: Loop) -> None:
        detector = self.rule.detector
        assert detector is not None
        generator = torch.Generator().manual_seed(loop.prompt_length)
        while not loop.finished:
            start = loop.snapshot()
            found = loop.candidates(1, CHUNK)[0]
            features = detector.features(self, found.looked)
            if float(detector.score(features)) >= self.rule.threshold:
                loop.append(found)
                continue
            edit = self.rule.edit(features)

            def gain(edit: Tensor, begin: Gain) -> tuple[Gain, Candidate]:
                loop.rewind(start, random=True)  # noqa: B023 - called right here
                loop.again()
                one = self.rule.redo(loop, edit)
                now = self.value(loop, one)
                return (now[0] - begin[0], now[1] - begin[1]), one

            before = self.value(loop, found)
            ours, kept = gain(edit, before)
            norm = edit.norm()
            noise = []
            for _ in range(DRAWS):
                other = torch.randn(edit.shape, generator=generator, dtype=edit.dtype)
                noise.append(gain(other / other.norm() * norm, before)[0])
            random = (mean(g[0] for g in noise), mean(g[1] for g in noise))
            flat = torch.ones_like(edit)
            uniform = gain(flat / flat.norm() * norm, before)[0]
            self.notes.append((ours, random, uniform))
            loop.append(kept)

    def value(self, loop: Loop, one: Candidate) -> Gain:
        assert self.rule.detector is not None
        detector = self.rule.detector
        logit = detector.logit(detector.features(self, one.looked))
        ids = torch.cat([loop.tokens[:, :START], one.tokens[None]], 1)
        return float(logit), float(self.decoder.faithful(ids).double().mean())


def measure(seed: int) -> Mapping[str, float]:
    """Gain in the detector's logit of redone chunks: GAME's edit beside random ones."""
    decoder = copying(seed)
    lens = LookbackLens(heads="all").fit(
        decoder.model, written(decoder, FIT, 100 + seed, least=STRETCH), progress=False
    )
    rule = GAME(heads="all", detector=lens.detector, chunk=CHUNK, step=STEP)
    recorder = Recorder(rule=rule, decoder=decoder)
    prompts = decoder.prompts(PROMPTS, 300 + seed)
    torch.manual_seed(seed)
    with ab.steer(decoder.model, recorder, spans=decoder.spans):
        decoder.model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=LENGTH,
            do_sample=True,
            top_k=0,
        )
    logits, shares = (
        [mean(note[kind][what] for note in recorder.notes) for kind in range(3)] for what in (0, 1)
    )
    return {
        "effect": logits[0],
        "control": logits[1],
        "uniform": logits[2],
        "faithful": shares[0],
        "faithful random": shares[1],
        "faithful uniform": shares[2],
        "chunks": float(len(recorder.notes)),
    }


EXPERIMENT = Experiment(
    work="game",
    claim=(
        "A chunk that scores low is redone once under an edit along the detector's gradient, with "
        "the same random numbers: the detector's logit rises. A tiny decoder that repeats its "
        "context or talks by heart; the detector is fitted on stretches of its own texts."
    ),
    control="Random edits of the same norm (mean of 4), at the same chunks.",
    measure=measure,
)
