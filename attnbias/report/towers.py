"""What was seen of an image, of the modalities of a prompt, of a tower that reads another.

Frozen records of plain numbers; `looking` fills them, `overlay` draws them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnbias.errors import AttnbiasError

SHUFFLED, FOLLOWED, RANDOM = "shuffled", "followed", "random"
CONTROLS = {
    SHUFFLED: "patches shuffled, by place",
    FOLLOWED: "patches shuffled, by patch",
    RANDOM: "random weights",
}
"""Name of a control -> what a reader is told."""


@dataclass(frozen=True)
class Picture:
    """An image as the model saw it: cropped, resized, in 8-bit colours.

    Attributes:
        pixels: ``(height, width, 3)`` uint8.
        name: of the file, where there is one.
    """

    pixels: Tensor
    name: str = ""

    def __post_init__(self) -> None:
        if self.pixels.ndim != 3 or self.pixels.shape[2] != 3 or self.pixels.dtype != torch.uint8:
            raise AttnbiasError(
                f"Picture(pixels) must be (height, width, 3) uint8, got {self.pixels.dtype} of "
                f"shape {tuple(self.pixels.shape)}."
            )

    @property
    def sha256(self) -> str:
        """SHA-256 of the pixels, hexadecimal."""
        return hashlib.sha256(self.pixels.contiguous().numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class Numbers:
    """One statistic for every head of a tower.

    Attributes:
        key: short name, as in files. title, unit, meaning: for a reader.
        layers: number of each row. values: ``(layers, heads)``, NaN where there is none.
        controls: name -> the same for a control. even: of attention spread evenly.
    """

    key: str
    title: str
    unit: str
    meaning: str
    layers: tuple[int, ...]
    values: Tensor
    controls: dict[str, Tensor] = field(default_factory=dict)
    even: float = float("nan")

    def __post_init__(self) -> None:
        _same(self.key, self.values, self.controls, len(self.layers), 2)


@dataclass(frozen=True)
class Surface:
    """One statistic for every head and patch of an image, in times the even share.

    Attributes:
        values: ``(layers, heads, rows, columns)``; the rest as in `Numbers`.
    """

    key: str
    title: str
    meaning: str
    layers: tuple[int, ...]
    values: Tensor
    controls: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _same(self.key, self.values, self.controls, len(self.layers), 4)

    def mean(self, layer: int | None = None, control: str | None = None) -> Tensor:
        """``(rows, columns)``: the mean over the heads of one layer, or of all layers."""
        values = self.values if control is None else self.controls[control]
        if layer is not None:
            values = values[self._row(layer)]
        return values.flatten(0, -3).nanmean(0)

    def head(self, layer: int, head: int) -> Tensor:
        """``(rows, columns)`` of one head."""
        if not 0 <= head < self.values.shape[1]:
            raise AttnbiasError(
                f"{self.key} has heads 0 to {self.values.shape[1] - 1}, not {head}."
            )
        return self.values[self._row(layer), head]

    def _row(self, layer: int) -> int:
        if layer not in self.layers:
            raise AttnbiasError(f"{self.key} has layers {self.layers}, not {layer}.")
        return self.layers.index(layer)


@dataclass(frozen=True)
class ImageSeen:
    """The attention of one tower to the patches of one image.

    Attributes:
        tower: "vision", or "text" where a language model reads the image's tokens.
        picture: the image. surfaces: over its patches. numbers: of each head.
    """

    tower: str
    picture: Picture
    surfaces: tuple[Surface, ...]
    numbers: tuple[Numbers, ...] = ()

    def _repr_html_(self) -> str:
        """The figures over the image, in a notebook."""
        from attnbias.report.overlay import fragment

        return "".join(fragment(self, surface.key) for surface in self.surfaces)


@dataclass(frozen=True)
class ModalitySeen:
    """Shares of attention that a language model gives to the kinds of tokens it reads.

    Attributes:
        tower: "text". groups: name -> number of tokens, in the order of the prompt's kinds.
        asked: whose attention it is: "all text", "last".
        numbers: one for each group and asker, its key ``asker->group``.
    """

    tower: str
    groups: dict[str, int]
    asked: tuple[str, ...]
    numbers: tuple[Numbers, ...]


@dataclass(frozen=True)
class CrossSeen:
    """Where a decoder looks in what its encoder read.

    Attributes:
        tower: "cross". source: what each encoder position is (a word, a time in seconds).
        target: the decoder's tokens.
        received: ``(layers, heads, source)``: attention to each encoder position, in times the even
            share, the mean over the decoder's tokens.
        numbers: of each head.
    """

    tower: str
    source: tuple[str, ...]
    target: tuple[str, ...]
    layers: tuple[int, ...]
    received: Tensor
    numbers: tuple[Numbers, ...]


@dataclass(frozen=True)
class TowersSeen:
    """Everything that was seen of one model with one input.

    Attributes:
        model, revision, architecture, version: as on every page. parts: in the order to be shown.
        settings: (name, value) in the order to be shown.
    """

    model: str
    revision: str
    architecture: str
    version: str
    parts: tuple[ImageSeen | ModalitySeen | CrossSeen, ...]
    settings: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not self.parts:
            raise AttnbiasError("parts: none came; a page needs at least one tower.")


def _same(key: str, values: Tensor, controls: dict[str, Tensor], rows: int, ndim: int) -> None:
    for name, one in {"values": values, **controls}.items():
        if one.ndim != ndim or one.shape != values.shape or len(one) != rows:
            raise AttnbiasError(
                f"{name} of {key!r} has shape {tuple(one.shape)}, expected {ndim} axes like "
                f"{tuple(values.shape)} with {rows} layers."
            )
