"""Music Transformer: relative attention on chorales, and on canons that it goes on with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnbias_models.music.canons import Canon, canons
from attnbias_models.music.data import Split, chorales, split
from attnbias_models.music.events import REST, Vocabulary
from attnbias_models.music.model import MusicConfig, MusicTransformer
from attnbias_models.music.sample import continued
from attnbias_models.music.task import MusicTask, costs_of, nats
from attnbias_models.training import Plan, seeded, train
from experiments.grid import Claim, Grid

POSITIONS = ("relative", "both", "sinusoid", "learned", "none")


def _trained(
    positions: str,
    task: MusicTask,
    rate: float,
    seed: int,
    *,
    steps: int,
    width: int,
    layers: int,
    dropout: float,
) -> MusicTransformer:
    """A small model after one training; all variants differ in `positions` alone."""
    config = MusicConfig(
        voices=task.vocabulary.voices,
        width=width,
        heads=4,
        layers=layers,
        hidden=4 * width,
        dropout=dropout,
        positions=positions,
        length=task.length,
    )
    plan = Plan(
        steps=steps,
        learning_rate=rate,
        schedule="cosine",
        warmup=min(50, steps // 2),
        clip=1.0,
        validate_every=max(steps // 5, 1),
        seed=seed,
    )
    model: MusicTransformer = seeded(lambda: MusicTransformer(config), seed)
    train(model, task, plan, progress=False)
    return model


def _by_place(model: nn.Module, pieces: list[Tensor], length: int, bins: int) -> dict[str, float]:
    """Nats a token in passages of four times the length: after that length, and by place."""
    long = 4 * length
    costs = costs_of(model, pieces, long, batch=8)
    wide = long // bins
    found = {"long": float(torch.cat([row[length:] for row in costs]).double().mean())}
    for first in range(0, long, wide):
        here = torch.cat([row[first : first + wide] for row in costs])
        found[f"nats_at_{first:03d}"] = float(here.double().mean())
    return found


# Chorales.


def _chorale_numbers(
    parts: Split, positions: str, rate: float, seed: int, *, length: int, steps: int, width: int
) -> dict[str, float]:
    vocabulary = Vocabulary()
    task = MusicTask(parts.train, parts.valid, vocabulary, length=length, batch=16, seed=seed)
    model = _trained(positions, task, rate, seed, steps=steps, width=width, layers=2, dropout=0.1)
    test = [vocabulary.encode(piece) for piece in parts.test]
    return {
        "validation": task.validate(model),
        "test": nats(model, test, length),
        **_by_place(model, test, length, 4),
    }


def measure_chorales(variant: str, setting: Mapping[str, Any], seed: int) -> dict[str, float]:
    parts = split(chorales())
    return _chorale_numbers(parts, variant, setting["rate"], seed, length=128, steps=800, width=64)


def reduced_chorales(seed: int) -> dict[str, float]:
    """Ten chorales, one of them to report: what the notes cost after 40 steps."""
    parts = split(chorales(10))
    found = _chorale_numbers(parts, "relative", 3e-3, seed, length=64, steps=40, width=32)
    return {"validation": found["validation"], "test": found["test"]}


# Canons.


def _made(count: int, seed: int, steps: int, delays: tuple[int, ...]) -> list[Canon]:
    return canons(count, seed, steps=steps, delays=delays)


def _copied(model: MusicTransformer, made: list[Canon], length: int, seed: int) -> dict[str, float]:
    """Share of the follower's notes that are not what the leader played, in generated canons.

    Each canon is begun as it was made until the follower has played `delay` notes, then continued
    to four times the length trained on.
    """
    vocabulary = Vocabulary(2)
    within: list[Tensor] = []
    beyond: list[Tensor] = []
    for delay in sorted({one.delay for one in made}):
        some = [one.piece for one in made if one.delay == delay]
        begun = 4 * delay  # tokens: two delays of two voices
        prime = torch.stack([vocabulary.encode(piece)[:begun] for piece in some])
        after = continued(model, prime, 4 * length - begun, temperature=0.8, seed=seed)
        for row in torch.cat([prime, after], 1):
            line = torch.from_numpy(vocabulary.decode(row).pitches)
            wanted = torch.where(line[:-delay, 0] == REST, REST, line[:-delay, 0] - 12)
            wrong = (line[delay:, 1] != wanted).double()
            within.append(wrong[delay : length // 2 - delay])
            beyond.append(wrong[length // 2 - delay :])
    return {
        "wrong_within": float(torch.cat(within).mean()),
        "wrong_beyond": float(torch.cat(beyond).mean()),
    }


def measure_canons(variant: str, setting: Mapping[str, Any], seed: int) -> dict[str, float]:
    length, delays = 64, (4, 6, 8)
    vocabulary = Vocabulary(2)
    pieces = [one.piece for one in _made(3000, 0, length // 2, delays)]
    valid = [one.piece for one in _made(60, 1, length // 2, delays)]
    short, long = _made(60, 2, length // 2, delays), _made(30, 3, 2 * length, delays)
    task = MusicTask(pieces, valid, vocabulary, length=length, batch=16, seed=seed, transpose=0)
    model = _trained(
        variant, task, setting["rate"], seed, steps=800, width=64, layers=2, dropout=0.0
    )
    notes = sum(one.piece.pitches.size for one in short)
    return {
        "validation": task.validate(model),
        "test": nats(model, [vocabulary.encode(one.piece) for one in short], length),
        "least": sum(one.surprise for one in short) / notes,
        **_by_place(model, [vocabulary.encode(one.piece) for one in long], length, 4),
        **_copied(model, long, length, seed),
    }


def reduced_canons(seed: int) -> dict[str, float]:
    """One delay, short canons, 160 steps: relative vectors, sinusoids, and the difference."""
    vocabulary = Vocabulary(2)
    pieces = [one.piece for one in _made(300, 0, 16, (4,))]
    valid = [one.piece for one in _made(40, 1, 16, (4,))]
    task = MusicTask(pieces, valid, vocabulary, length=32, batch=16, seed=seed, transpose=0)
    found = {
        positions: task.validate(
            _trained(positions, task, 1e-2, seed, steps=160, width=32, layers=1, dropout=0.0)
        )
        for positions in ("relative", "sinusoid")
    }
    return {**found, "gain": found["sinusoid"] - found["relative"]}


RATES = ({"rate": 1e-3}, {"rate": 2e-3}, {"rate": 4e-3})
SOURCES = (
    "models/attnbias_models/music",
    "models/attnbias_models/attend.py",
    "models/attnbias_models/training.py",
    "experiments/models/music_transformer.py",
    "experiments/grid.py",
    "attnbias/forms/music_transformer.py",
)

GRIDS = (
    Grid(
        name="music_chorales",
        work="music-transformer",
        question="Do relative vectors make Bach's chorales likelier than vectors added to the "
        "tokens, and do they hold past the length trained on?",
        data="chorales of Bach in four voices on sixteenths, from the corpus of music21: 70 % to "
        "train on, 15 % to choose by, 15 % to report, whole pieces.",
        variants=POSITIONS,
        measure=measure_chorales,
        search=RATES,
        claims=(
            Claim(
                "Held-out notes are likelier than with sinusoids", "test", "relative", "sinusoid"
            ),
            Claim("... than with learned places", "test", "relative", "learned"),
            Claim("... than without positions", "test", "relative", "none"),
            Claim(
                "Past the length trained on, notes are likelier than with sinusoids",
                "long",
                "relative",
                "sinusoid",
            ),
            Claim(
                "... than with learned places (the last one shared)", "long", "relative", "learned"
            ),
            Claim("... than without positions", "long", "relative", "none"),
        ),
        reduced=reduced_chorales,
        sources=SOURCES,
        note="Passages of 128 tokens (two bars), 2 layers of width 64, 800 steps of 16 passages, "
        "transposed by up to three semitones: far smaller than the paper's models, so that "
        "numbers of its tables are not compared with. `long` counts places 128 to 511 of passages "
        "of 512 tokens. Chorales with one melody in several settings fall into several parts.",
    ),
    Grid(
        name="music_canons",
        work="music-transformer",
        question="Is a voice that follows at a distance learned, and kept up past the length "
        "trained on, also when the model itself makes the music?",
        data="canons in two voices made by rule: a random leader, the follower 4, 6 or 8 steps "
        "later, an octave lower.",
        variants=POSITIONS,
        measure=measure_canons,
        search=RATES,
        claims=(
            Claim("Notes are likelier than with sinusoids", "test", "relative", "sinusoid"),
            Claim("... than with learned places", "test", "relative", "learned"),
            Claim("... than without positions", "test", "relative", "none"),
            Claim(
                "In canons made past the length trained on, the follower errs less than with "
                "sinusoids",
                "wrong_beyond",
                "relative",
                "sinusoid",
            ),
            Claim("... than with learned places", "wrong_beyond", "relative", "learned"),
            Claim("... than without positions", "wrong_beyond", "relative", "none"),
        ),
        reduced=reduced_canons,
        sources=SOURCES,
        seeds=(0, 1, 2, 3, 4),
        note="Passages of 64 tokens (32 steps); canons of 256 tokens are begun by rule, for two "
        "delays, and continued at temperature 0.8. `least` is what the leader cannot but cost. Two "
        "seeds were added to the first three, whose intervals were wide.",
    ),
)
