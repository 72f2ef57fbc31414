"""The small decoder with linear attention of the work on loss plateaus, its task and its school."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

COUNT, MODULUS = 16, 17  # integers in a list; the separator is the modulus
OUTPUTS = slice(COUNT, 2 * COUNT)  # the rows whose next token is an answer


def moving_sums(rows: int, generator: torch.Generator) -> Tensor:
    """``(rows, 33)``: 16 integers, the separator, and ``x_1, (x_{i-1} + x_i) mod 17``."""
    given = torch.randint(1, MODULUS, (rows, COUNT), generator=generator)
    sums = torch.cat([given[:, :1], (given[:, 1:] + given[:, :-1]) % MODULUS], 1)
    return torch.cat([given, given.new_full((rows, 1), MODULUS), sums], 1)


def correct(shift: int = 0) -> Tensor:
    """``(32, 32)`` booleans: the keys that each answer is made of; `shift` moves all of them."""
    found = torch.zeros(2 * COUNT, 2 * COUNT, dtype=torch.bool)
    found[COUNT, 0 if not shift else shift % COUNT] = True
    for answer in range(1, COUNT):
        for place in (answer - 1, answer):
            found[COUNT + answer, (place + shift) % COUNT] = True
    return found


def scaled(factor: float, shift: int = 0) -> Tensor:
    """``(32, 32)`` factors of the map: `factor` at what `correct` names, but for the first answer.

    The first answer is learnt in a few steps anyway and is left alone, as in the authors' code.
    """
    where = correct(shift)
    where[COUNT] = False
    return torch.where(where, factor, 1.0)


class Attention(nn.Module):
    """One head: ``c * (q . k / sqrt(d))`` under the causal mask, without a softmax."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(size, size) for _ in range(4))
        self.map = torch.empty(0)

    def forward(self, x: Tensor, factors: Tensor, rows: slice) -> Tensor:
        scores = self.query(x[:, rows]) @ self.key(x).mT / math.sqrt(x.shape[-1])
        length = x.shape[1]
        weights = scores * factors[:length, :length].tril()[rows]
        self.map = weights.detach()
        out: Tensor = self.out(weights @ self.value(x))
        return out


class Decoder(nn.Module):
    """One pre-norm layer of width `size`, learnt positions, MLP four times as wide."""

    def __init__(self, size: int = 256) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(18, size), nn.Embedding(33, size)
        self.norms = nn.ModuleList(nn.LayerNorm(size) for _ in range(3))
        self.attention = Attention(size)
        self.up, self.down = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)
        self.head = nn.Linear(size, 18, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                last = name in ("attention.out.weight", "down.weight")
                nn.init.normal_(weight, std=0.02 / math.sqrt(2) if last else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def hidden(self, ids: Tensor, factors: Tensor, rows: slice = slice(None)) -> Tensor:
        """The states that the head reads at chosen positions: ``(rows, tokens, size)``."""
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        x = x[:, rows] + self.attention(self.norms[0](x), factors, rows)
        x = x + self.down(nn.functional.gelu(self.up(self.norms[1](x)), approximate="tanh"))
        found: Tensor = self.norms[2](x)
        return found

    def loss(self, rows: Tensor, factors: Tensor) -> Tensor:
        """Cross-entropy of every next token, the random integers too, as in the authors' code."""
        logits = self.head(self.hidden(rows[:, :-1], factors))
        return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    @torch.no_grad()
    def answers(self, rows: Tensor, factors: Tensor) -> Tensor:
        """The model's own answers to the lists of `rows`, greedy: ``(rows, 16)``."""
        ids = rows[:, : COUNT + 1]
        for _ in range(COUNT):
            last = self.hidden(ids, factors, slice(-1, None))
            ids = torch.cat([ids, self.head(last).argmax(-1)], 1)
        return ids[:, COUNT + 1 :]


@dataclass
class Course:
    """What was seen of one training, every few steps."""

    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    progress: list[float] = field(default_factory=list)
    repetition: list[float] = field(default_factory=list)
    cosine: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def first(self, values: list[float], level: float, missing: int) -> int:
        """The first step at which a value reaches a level; `missing` where it never does."""
        return next(
            (step for step, value in zip(self.steps, values, strict=True) if value >= level),
            missing,
        )


def school(
    seed: int,
    factors: Tensor,
    *,
    steps: int,
    size: int = 256,
    batch: int = 256,
    rate: float = 1e-4,
    every: int = 5,
    enough: float = 0.95,
) -> Course:
    """Train from scratch with Adam on fresh lists and look every few steps.

    Stops at `steps`, or once the accuracy of generated answers has reached `enough`.
    """
    from attnbias.measures.attention_progress import collapse, progress, repetition

    torch.manual_seed(seed)
    model, course = Decoder(size), Course()
    generator = torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for step in range(1, steps + 1):
        rows = moving_sums(batch, generator)
        optimizer.zero_grad(set_to_none=True)
        loss = model.loss(rows, factors)
        torch.autograd.backward(loss)
        optimizer.step()
        if step % every and step > 1:
            continue
        test = moving_sums(64, generator)
        with torch.no_grad():
            states = model.hidden(test[:, :-1], factors)[:, OUTPUTS]
        shown = model.attention.map[:, None, OUTPUTS]
        found = model.answers(test, factors)
        course.steps.append(step)
        course.loss.append(float(loss.detach()))
        course.accuracy.append(float((found == test[:, COUNT + 1 :]).double().mean()))
        course.progress.append(float(progress(shown, correct()[OUTPUTS]).mean()))
        course.repetition.append(float(repetition(found).mean()))
        course.cosine.append(float(collapse(states).mean()))
        if course.accuracy[-1] >= enough:
            break
    return course
