"""Measure the modalities of a prompt: shares by kind of token, and the image as text sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError, Refused
from attnbias.observe.grid import Grid
from attnbias.report.looking import SEED, Layers, layers_of_tower, picture, untrained
from attnbias.report.towers import RANDOM, ImageSeen, ModalitySeen, Numbers, Surface

if TYPE_CHECKING:
    from attnbias.observe import Seen


def see_modalities(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    layers: Layers = "all",
    seed: int = SEED,
    controls: bool = True,
) -> ModalitySeen:
    """How a model of images and text shares its attention between them.

    Groups of tokens: the first token, every image and video, and all other text. The attention is
    that of all text tokens after the first image token ("text"), and of the last token ("last").
    Control: random weights. The even share of a group is what a head would give it that spreads its
    attention evenly over the tokens it sees.

    Args:
        model: LLaVA, Qwen2-VL, Gemma3 and the like, whose config names its image token.
        inputs: keyword arguments of one forward, one row.

    Raises:
        AttnbiasError: no image token in the inputs, several rows.
    """
    groups = modalities(model, inputs)
    length = len(groups["text"])
    seeing = groups["text"].clone()
    first = int(torch.stack([g for n, g in groups.items() if n not in ("text", "first")]).any(0)
                .long().argmax())  # fmt: skip
    seeing[:first] = False
    last = torch.zeros(length, dtype=torch.bool)
    last[-1] = True
    askers = {"text": seeing, "last": last}
    chosen = layers_of_tower(model, "text", layers)
    seen = {"": _shares(model, inputs, groups, chosen)}
    if controls:
        seen[RANDOM] = _shares(untrained(model, seed), inputs, groups, chosen)
    even = _even(groups)
    found = []
    for who, mask in askers.items():
        if not bool(mask.any()):
            continue
        for name in groups:
            tables = {}
            for which, one in seen.items():
                part = one.tensor("share", "text").select(run=0, batch=0, span=name)
                tables[which] = part.values[..., mask].nanmean(-1)
            what = WHO[who]
            meaning = f"The part of its attention that a head gives to {_kind(name)}, {what}."
            found.append(
                Numbers(
                    f"{who}->{name}", f"{what.capitalize()} to {_kind(name)}",
                    "share of attention", meaning, tuple(part.labels["layer"]),
                    tables.pop(""), tables,
                    float(even[name][mask].mean()),
                )
            )  # fmt: skip
    return ModalitySeen(
        "text", {name: int(mask.sum()) for name, mask in groups.items()}, tuple(askers),
        tuple(found),
    )  # fmt: skip


WHO = {
    "text": "from the text after the image begins",
    "last": "from the last token",
}


def _kind(name: str) -> str:
    return {"first": "the first token", "text": "the text"}.get(name, name)


def modalities(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Which tokens of a prompt are what: "first", "image 0", ..., "text"; booleans (tokens)."""
    from attnbias.hub import spans as spans_of

    ids = inputs.get("input_ids")
    if isinstance(ids, Tensor) and len(ids) != 1:
        raise AttnbiasError(f"inputs must hold one row, got {len(ids)}.")
    spans = spans_of(model, inputs)
    stop = spans["generated"][0]
    found = {"first": torch.arange(stop) == 0}
    for name, span in spans.items():
        if name[-1].isdigit():
            found[name] = (torch.arange(stop) >= span[0]) & (torch.arange(stop) < span[1])
    if len(found) == 1:
        raise AttnbiasError("inputs hold no image: there is no image token among their input_ids.")
    found["first"] &= ~torch.stack([g for n, g in found.items() if n != "first"]).any(0)
    found["text"] = ~torch.stack(list(found.values())).any(0)
    return found


def _even(groups: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For each token, the part of the tokens up to it that belongs to a group."""
    length = len(next(iter(groups.values())))
    seen = torch.arange(1, length + 1)
    return {name: mask.double().cumsum(0) / seen for name, mask in groups.items()}


def _shares(
    model: nn.Module, inputs: Mapping[str, Any], groups: Mapping[str, Tensor], layers: Any
) -> Seen:
    from attnbias.hub.modes import evaluating
    from attnbias.observe import observe, statistics

    with (
        evaluating(model),
        torch.no_grad(),
        observe(model, [statistics.Share()], spans=dict(groups), layers=layers) as seen,
    ):
        model(**inputs)
    return seen


def see_image_in_text(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    processor: Any = None,
    image: int = 0,
    layers: Layers = "all",
    controls: bool = True,
    seed: int = SEED,
    name: str = "",
) -> ImageSeen:
    """Where the last token of a prompt looks in an image, in the language model that reads it.

    Surface, in times the even share over all tokens of the prompt: the row of the last token over
    the image's tokens. Control: random weights.

    Args:
        model, inputs, layers, controls, seed: as in `see_modalities`. image: which one.
        processor, name: as in `see_image`.

    Raises:
        AttnbiasError: no such image. Refused: image tokens that form no grid.
    """
    groups = modalities(model, inputs)
    mask = groups.get(f"image {image}")
    if mask is None:
        raise AttnbiasError(f"inputs hold no image {image}; there is {', '.join(groups)}.")
    grid = _grid(model, inputs, mask, image)
    last = torch.zeros_like(mask)
    last[-1] = True
    chosen = layers_of_tower(model, "text", layers)
    runs = {"": _given(model, inputs, last, chosen)}
    if controls:
        runs[RANDOM] = _given(untrained(model, seed), inputs, last, chosen)
    found = {}
    for which, one in runs.items():
        part = one.tensor("given", "text").select(run=0, batch=0)
        found[which] = grid.over(part.values) * len(mask)
    surface = Surface(
        "given", "Attention of the last token",
        "Where the last token of the prompt looks in the image, in times the share that each token "
        "of the prompt would receive if it looked at all alike (1 is even).",
        tuple(part.labels["layer"]), found.pop(""), found,
    )  # fmt: skip
    shown = picture(inputs, processor, Grid.of(model, inputs, image), image, name)
    return ImageSeen("text", shown, (surface,))


def _grid(model: nn.Module, inputs: Mapping[str, Any], mask: Tensor, image: int) -> Grid:
    """The tokens of an image in the prompt, row by row."""
    start, count = int(mask.long().argmax()), int(mask.sum())
    sizes = inputs.get("image_grid_thw")
    if isinstance(sizes, Tensor):
        config = getattr(model, "config", None)
        merge = int(getattr(getattr(config, "vision_config", None), "spatial_merge_size", 1))
        frames, rows, columns = (int(n) for n in sizes[image])
        if frames * (rows // merge) * (columns // merge) == count and frames == 1:
            return Grid(rows // merge, columns // merge, start)
    grid = Grid.square(start, count)
    if grid is None or isinstance(sizes, Tensor):
        raise Refused(
            f"the {count} tokens of image {image} form no grid that is known, so the attention to "
            "them is not drawn over it."
        )
    return grid


def _given(model: nn.Module, inputs: Mapping[str, Any], last: Tensor, layers: Any) -> Seen:
    from attnbias.hub.modes import evaluating
    from attnbias.observe import observe, statistics

    with (
        evaluating(model),
        torch.no_grad(),
        observe(model, [statistics.Given("last")], spans={"last": last}, layers=layers) as seen,
    ):
        model(**inputs)
    return seen
