"""Where the patches of an image stand among the tokens of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError, Refused


@dataclass(frozen=True)
class Grid:
    """The patches of one image, row by row, as tokens of a tower.

    Attributes:
        rows, columns: of the image in patches.
        start: position of the first patch token; the tokens before it are the class token and
            registers in a vision tower, the prompt before the image in a text tower.
        order: for each patch, row by row, its place among the patch tokens; None where they come
            row by row. (Qwen2-VL's vision tower reads blocks that it will merge.)
    """

    rows: int
    columns: int
    start: int = 1
    order: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "columns"):
            _whole(name, getattr(self, name), 1)
        _whole("start", self.start, 0)
        if self.order is not None and sorted(self.order) != list(range(self.patches)):
            raise AttnbiasError(
                f"Grid(order) must name each of {self.patches} patches once, got {self.order!r}."
            )

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns} from {self.start}"

    @property
    def patches(self) -> int:
        """How many patches there are."""
        return self.rows * self.columns

    @property
    def stop(self) -> int:
        """The position after the last patch token."""
        return self.start + self.patches

    def positions(self) -> Tensor:
        """``(rows, columns)``: the token position of each patch."""
        at = torch.arange(self.patches) if self.order is None else torch.tensor(self.order)
        return (self.start + at).reshape(self.rows, self.columns)

    def cells(self, positions: Tensor) -> Tensor:
        """``(..., 2)``: row and column of token positions ``(...)``, -1 for what is no patch."""
        place = positions - self.start
        known = (place >= 0) & (place < self.patches)
        place = torch.where(known, place, 0)
        if self.order is not None:
            at = torch.empty(self.patches, dtype=torch.long)
            at[torch.tensor(self.order)] = torch.arange(self.patches)
            place = at.to(place.device)[place]
        cell = torch.stack([place // self.columns, place % self.columns], -1)
        return torch.where(known[..., None], cell, -1)

    def over(self, values: Tensor) -> Tensor:
        """Values ``(..., tokens)`` by token position as ``(..., rows, columns)``."""
        if values.shape[-1] < self.stop:
            raise AttnbiasError(
                f"the grid ends at token {self.stop} and the values have {values.shape[-1]} tokens."
            )
        return values[..., self.positions().to(values.device)]

    @classmethod
    def of(cls, model: nn.Module, inputs: Mapping[str, Any], image: int = 0) -> Grid:
        """The patches of an image in the vision tower of a model.

        Args:
            model: ViT, DINOv2 (with or without registers), CLIP, SigLIP and the like, which have
                one token for each patch in every layer; Qwen2-VL's tower, whose input is patches.
            inputs: keyword arguments of one forward, with ``pixel_values``.
            image: which image of the inputs; matters where they hold several of different sizes.

        Raises:
            AttnbiasError: no ``pixel_values``. Refused: a tower whose tokens are not its patches.
        """
        pixels = inputs.get("pixel_values")
        if not isinstance(pixels, Tensor):
            raise AttnbiasError(
                f"inputs must hold pixel_values, got {', '.join(inputs) or 'nothing'}."
            )
        config = getattr(model, "config", None)
        config = getattr(config, "vision_config", config)
        sizes = inputs.get("image_grid_thw")
        if isinstance(sizes, Tensor):
            return _blocks(sizes, int(getattr(config, "spatial_merge_size", 1)), image)
        patch = getattr(config, "patch_size", None)
        if pixels.ndim != 4 or patch is None or hasattr(config, "window_size"):
            raise Refused(
                f"{type(model).__name__}: the tokens of its layers are not the patches of a "
                "(batch, channels, height, width) image, so nothing can be drawn over it."
            )
        high, wide = (patch, patch) if isinstance(patch, int) else tuple(patch)[-2:]
        rows, columns = pixels.shape[-2] // high, pixels.shape[-1] // wide
        return cls(rows, columns, _before(model, config))

    @classmethod
    def square(cls, start: int, tokens: int) -> Grid | None:
        """As many image tokens as a square has, from a position on; None where they do not."""
        side = math.isqrt(tokens)
        return cls(side, side, start) if side * side == tokens and tokens else None


def _blocks(sizes: Tensor, merge: int, image: int) -> Grid:
    if not 0 <= image < len(sizes):
        raise AttnbiasError(f"image must be 0 to {len(sizes) - 1}, got {image}.")
    frames, rows, columns = (int(n) for n in sizes[image])
    if frames != 1:
        raise Refused(f"image {image} has {frames} frames; a video is not drawn over one image.")
    cells = torch.arange(rows * columns).reshape(
        rows // merge, columns // merge, merge, merge
    )  # token k stands at this place among (block row, block column, row, column)
    order = cells.permute(0, 2, 1, 3).flatten()
    # The tower attends within one image at a time: every image is a run of its own, from 0.
    return Grid(rows, columns, 0, tuple(order.tolist()))


def _before(model: nn.Module, config: Any) -> int:
    """Class token and registers, counted in the parameters of the embeddings."""
    registers = int(getattr(config, "num_register_tokens", 0) or 0)
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_parameters()}
    text = " ".join(names)
    extra = int("cls_token" in text or "class_embedding" in text)
    return extra + int("distillation_token" in text) + registers


def _whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise AttnbiasError(f"Grid({name}) must be a whole number from {least}, got {value!r}.")
