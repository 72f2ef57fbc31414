"""Secondary attention sinks: tokens that turn into sinks in the middle of a model, and why."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError, Refused
from attnbias.measures._residual import main_tower, residual
from attnbias.measures.base import Data, Measure, bar, evaluating, forwards
from attnbias.observe import observe
from attnbias.observe.statistics import Received
from attnbias.steer.hidden import HiddenCall
from attnbias.steer.rule import Heads, Rule

Kind = Literal["primary", "secondary", "noise"]


@dataclass(frozen=True)
class Sink:
    """A token whose hidden state points along that of the sample's primary sink.

    Attributes:
        sample, position: where it stands. kind: by its lifetime.
        layers: after which layers it is aligned; the first of them created it.
        norm: L2 norm of what the MLP of the creating layer adds to the token.
        cosine: of that MLP output with the primary sink's hidden state after the same layer.
        score: attention that it receives, mean over the queries that see it, over heads, and over
            the layers that read an aligned state; NaN where none does (the last layer).
    """

    sample: int
    position: int
    kind: Kind
    layers: tuple[int, ...]
    norm: float
    cosine: float
    score: float

    @property
    def start(self) -> int:
        """The layer that created it."""
        return self.layers[0]

    @property
    def lifetime(self) -> int:
        """After how many layers it is aligned."""
        return len(self.layers)


@dataclass(frozen=True)
class Sinks:
    """What `SecondarySinks` found.

    Attributes:
        tower: of the model. layers: its layers.
        sinks: all of them, primary sinks too, by sample and position.
        aligned: ``(samples, layers, tokens)``: whether a token is aligned after a layer.
        received: ``(samples, layers, tokens)``: attention received in a layer, mean over heads.
        directions: ``(layers, size)``: the mean of the primary sinks' hidden states, each of norm
            1.
    """

    tower: str
    layers: tuple[int, ...]
    sinks: tuple[Sink, ...]
    aligned: Tensor
    received: Tensor
    directions: Tensor

    def of(self, kind: Kind) -> tuple[Sink, ...]:
        """The sinks of one kind."""
        return tuple(one for one in self.sinks if one.kind == kind)

    @property
    def levels(self) -> dict[tuple[int, int], int]:
        """``(creating layer, lifetime)`` of the secondary sinks -> how many, the most first."""
        return dict(
            Counter((one.start, one.lifetime) for one in self.of("secondary")).most_common()
        )

    def rescaling(
        self,
        layer: int,
        norm: float = 100.0,
        *,
        cosine: float = 0.98,
        skip: int = 3,
        clip: bool = False,
    ) -> Rule:
        """A rule that gives every aligned MLP output of one layer the same norm.

        Args:
            layer: whose MLP; the source's script has 22, of 48.
            norm: published: 100. Outputs that are smaller are made larger, as in the authors' code.
            cosine: least cosine of an output with the primary sink's direction, published: 0.98.
            skip: positions from 0 that are left alone, published: 3.
            clip: True only ever makes outputs smaller, as the paper's text has it.
        """
        if layer not in self.layers:
            raise AttnbiasError(f"rescaling(layer) must be of {self.layers}, got {layer!r}.")
        if not (isinstance(norm, (int, float)) and norm >= 0 and math.isfinite(norm)):
            raise AttnbiasError(f"rescaling(norm) must be a number from 0, got {norm!r}.")
        vector = self.directions[self.layers.index(layer)]
        return _Rescale(
            layers=(layer,),
            towers=(self.tower,),
            direction=tuple(vector.tolist()),
            norm=float(norm),
            cosine=cosine,
            skip=skip,
            clip=clip,
        )

    def __str__(self) -> str:
        found = self.of("secondary")
        if not found:
            return f"No secondary sink in {len(self.aligned)} samples ({self.tower})."
        levels = ", ".join(
            f"{count} from layer {start} for {life} layers"
            for (start, life), count in list(self.levels.items())[:6]
        )
        return (
            f"{len(found)} secondary sinks in {len(self.aligned)} samples ({self.tower}): {levels}."
        )


@dataclass(frozen=True)
class SecondarySinks(Measure):
    r"""Tokens that a middle layer turns into sinks, found in the hidden states.

    The primary sink p is the one of the first `candidates` tokens with the largest mean norm. With
    :math:`n_l = \lVert h_p^l \rVert` after layer l, it is huge after the layers

    .. math:: a = 1 + \arg\max_l (n_{l+1} - n_l) \quad\text{to}\quad
              b = \arg\min_{l \ge a} (n_{l+1} - n_l)

    and a later token i is a sink after such a layer where
    :math:`|\cos(h_i^l, h_p^l)| > \mathrm{cosine}`. Its lifetime is the number of these layers:
    with L layers, at least ``L - slack`` makes it a primary sink, more than `least` a secondary
    one, anything else is noise. `Sinks.levels` counts creating layers and lifetimes; each `Sink`
    says how its creating MLP wrote it (norm, cosine) and what attention it receives;
    `Sinks.rescaling` is the intervention.

    Args:
        cosine: published: 0.9.
        slack: published: 15, for models of 28 to 64 layers. least: published: 4. Rescale both for
            shallower models; where ``L - slack`` is not above ``least + 1`` nothing could be
            secondary, and that is refused.
        candidates: how many first tokens may be the primary sink; published: 2, 3 behind a chat
            template.
        tower: by default the text tower, else the first.

    Cost: one forward for each entry of the data and one more fused call for each layer.

    Raises:
        AttnbiasError: no data, parameters out of range. Refused: a model that is too shallow for
            slack and least, unknown layers.

    Source: On the Existence and Behaviour of Secondary Attention Sinks, 2025 (arXiv 2512.22213);
    authors' code read. Departures: the last layer is read before the final norm; the scan begins
    right after the primary sink, as there. The score is the mean attention received from the
    queries that see the token; the source's notebook for it was not read.
    """

    name: ClassVar[str] = "secondary_sinks"
    cosine: float = 0.9
    slack: int = 15
    least: int = 4
    candidates: int = 2
    tower: str | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.cosine, (int, float)) and 0 <= self.cosine <= 1):
            raise AttnbiasError(
                f"SecondarySinks(cosine) must lie between 0 and 1, got {self.cosine!r}."
            )
        for word, low in (("slack", 0), ("least", 0), ("candidates", 1)):
            value = getattr(self, word)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise AttnbiasError(
                    f"SecondarySinks({word}) must be a whole number from {low}, got {value!r}."
                )

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> Sinks:
        given, sinks = forwards(data, "SecondarySinks"), list[Sink]()
        aligned, received, directions = list[Tensor](), list[Tensor](), list[Tensor]()
        tower, layers = main_tower(model, self.tower), tuple[int, ...]()
        with evaluating(model), bar(len(given), self.name, progress) as tick:
            for inputs in given:
                with observe(model, [Received("visible")]) as seen:
                    state = residual(model, inputs, tower, ("layer", "mlp"))
                layers = state.layers
                self._deep_enough(len(layers))
                mass = seen.tensor("received", tower).values.nanmean(3)  # (run, layer, row, token)
                mass = mass.movedim(1, 2).flatten(0, 1)
                for row, real in enumerate(state.real):
                    tokens = int(real.sum())
                    hidden, mlp = (state.states[n][:, row, :tokens] for n in ("layer", "mlp"))
                    here, primary = self._aligned(hidden)
                    sinks += self._sinks(
                        len(aligned), here, primary, hidden, mlp, mass[row], layers
                    )
                    aligned.append(here)
                    received.append(mass[row])
                    directions.append(nn.functional.normalize(hidden[:, primary], dim=-1))
                tick()
        return Sinks(
            tower,
            layers,
            tuple(sinks),
            _stacked(aligned, False),
            _stacked(received, torch.nan),
            torch.stack(directions).mean(0),
        )

    def _deep_enough(self, depth: int) -> None:
        if depth - self.slack <= self.least + 1:
            raise Refused(
                f"SecondarySinks: the tower has {depth} layers, so with slack={self.slack} and "
                f"least={self.least} no lifetime is secondary; write for example "
                f"SecondarySinks(slack={max(depth // 3, 1)}, least={depth // 8})."
            )

    def _aligned(self, hidden: Tensor) -> tuple[Tensor, int]:
        """(layers, tokens) bool and the primary sink, from (layers, tokens, size)."""
        norms = hidden.norm(dim=-1)
        primary = int(norms[:, : self.candidates].mean(0).argmax())
        rise = norms[1:, primary] - norms[:-1, primary]
        start = int(rise.argmax()) + 1
        rest = rise[start:]
        stop = start + 1 + int(rest.argmin()) if len(rest) else len(hidden)
        cosine = nn.functional.cosine_similarity(hidden, hidden[:, primary, None], dim=-1)
        found = cosine.abs() > self.cosine
        found[:, : primary + 1] = False
        found[:, primary] = True
        found[:start] = False
        found[stop:] = False
        return found, primary

    def _kind(self, lifetime: int, depth: int) -> Kind:
        if lifetime >= depth - self.slack:
            return "primary"
        return "secondary" if lifetime > self.least else "noise"

    def _sinks(
        self,
        sample: int,
        aligned: Tensor,
        primary: int,
        hidden: Tensor,
        mlp: Tensor,
        mass: Tensor,
        layers: tuple[int, ...],
    ) -> list[Sink]:
        found = []
        for token in aligned.any(0).nonzero()[:, 0].tolist():
            where = aligned[:, token].nonzero()[:, 0].tolist()
            added = mlp[where[0], token]
            read = [place + 1 for place in where if place + 1 < len(layers)]
            found.append(
                Sink(
                    sample,
                    token,
                    self._kind(len(where), len(layers)),
                    tuple(layers[place] for place in where),
                    float(added.norm()),
                    float(nn.functional.cosine_similarity(added, hidden[where[0], primary], dim=0)),
                    float(mass[read, token].mean()) if read else math.nan,
                )
            )
        return found


@dataclass(frozen=True, kw_only=True)
class _Rescale(Rule):
    """MLP outputs along a direction get one norm."""

    heads: Heads = "all"
    direction: tuple[float, ...] = field(default=())
    norm: float = 100.0
    cosine: float = 0.98
    skip: int = 3
    clip: bool = False

    hidden_at: ClassVar[tuple[str, ...]] = ("mlp",)

    def hidden(self, site: HiddenCall, hidden: Tensor) -> Tensor | None:
        direction = torch.tensor(self.direction, dtype=torch.float64, device=hidden.device)
        states = hidden.double()
        size = states.norm(dim=-1, keepdim=True)
        along = nn.functional.cosine_similarity(states, direction, dim=-1) > self.cosine
        chosen = (along & (site.positions >= self.skip))[..., None] & (size > 0)
        if self.clip:
            chosen = chosen & (size > self.norm)
        return torch.where(chosen, (states * (self.norm / size)).to(hidden), hidden)


def _stacked(parts: list[Tensor], fill: float) -> Tensor:
    """Samples of different lengths as one tensor."""
    size = max(part.shape[-1] for part in parts)
    return torch.stack(
        [nn.functional.pad(p, (0, size - p.shape[-1]), value=fill) for p in parts]
    ).cpu()
