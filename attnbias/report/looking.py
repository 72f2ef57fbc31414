"""Measure towers: an image under a vision model, the modalities of a prompt, cross-attention."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError, Refused
from attnbias.observe.grid import Grid
from attnbias.report.towers import (
    FOLLOWED,
    RANDOM,
    SHUFFLED,
    ImageSeen,
    Numbers,
    Picture,
    Surface,
)

if TYPE_CHECKING:
    from attnbias.observe import Seen

SEED = 20240229
Layers = str | Iterable[int]


def see_image(
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
    """The attention of a vision tower to the patches of an image, with its controls.

    Surfaces, in times the even share: attention received by each patch from all tokens, and from
    the class token where there is one. Numbers of each head: the share that goes to the class
    token, to registers and to patches; entropy. Controls: the same image with its patches shuffled
    (read by place, and followed to where each patch went), and the same architecture with random
    weights. Three forwards; the model is left as it is.

    Args:
        model: a vision model, or one that has a vision tower (CLIP, LLaVA, Qwen2-VL).
        inputs: keyword arguments of one forward.
        processor: what made the inputs; its mean and deviation give the picture its colours back.
        image: which image of the inputs. layers: as in `observe`. controls: False measures alone.
        seed: of the shuffle and the random weights. name: of the image.

    Raises:
        AttnbiasError: inputs without an image. Refused: a tower whose tokens are not its patches.
    """
    grid = Grid.of(model, inputs, image)
    run, row = (image, 0) if "image_grid_thw" in inputs else (0, image)
    places = {"patches": (grid.start, grid.stop)}
    if grid.start:
        places = {"class": (0, 1), **places}
    if grid.start > 1:
        places["registers"] = (1, grid.start)
    chosen = layers_of_tower(model, "vision", layers)
    order = moved(grid.patches, seed)

    def look(one: nn.Module, given: Mapping[str, Any]) -> Seen:
        return _look(one, given, places, chosen)

    seen = {"": look(model, inputs)}
    if controls:
        seen[SHUFFLED] = look(model, shuffle_patches(inputs, grid, order, image))
        seen[RANDOM] = look(untrained(model, seed), inputs)
    labels = {"received": "received[queries]", **({"given": "given[class]"} if grid.start else {})}
    surfaces = []
    for key, label in labels.items():
        found = {}
        for which, one in seen.items():
            part = one.tensor(label, "vision").select(run=run, batch=row)
            tokens = int((~part.values[0, 0].isnan()).sum())
            found[which] = grid.over(part.values) * tokens
        if controls:
            found[FOLLOWED] = torch.empty_like(found[SHUFFLED]).flatten(-2)
            found[FOLLOWED][..., order] = found[SHUFFLED].flatten(-2)
            found[FOLLOWED] = found[FOLLOWED].reshape_as(found[SHUFFLED])
        title, meaning = SURFACES[key]
        surfaces.append(Surface(key, title, meaning, _numbers(part), found.pop(""), found))
    return ImageSeen(
        "vision", picture(inputs, processor, grid, image, name), tuple(surfaces),
        _of_heads(seen, "vision", places, run, row),
    )  # fmt: skip


SURFACES = {
    "received": (
        "Attention received",
        "How much attention a patch receives from all tokens, in times the share it would receive "
        "if every token spread its attention evenly (1 is even).",
    ),
    "given": (
        "Attention of the class token",
        "Where the class token looks, in times the even share (1 is even).",
    ),
}


def _look(
    model: nn.Module, inputs: Mapping[str, Any], places: Mapping[str, Any], layers: Any
) -> Seen:
    from attnbias.hub.modes import evaluating
    from attnbias.observe import observe, statistics

    wanted: list[Any] = [statistics.Received("queries"), statistics.Entropy(), statistics.Share()]
    if "class" in places:
        wanted.append(statistics.Given("class"))
    with (
        evaluating(model),
        torch.no_grad(),
        observe(model, wanted, spans=places, layers=layers) as seen,
    ):
        model(**inputs)
    return seen


def _of_heads(
    seen: Mapping[str, Seen], tower: str, places: Mapping[str, Any], run: int, row: int
) -> tuple[Numbers, ...]:
    found: list[Numbers] = []

    def add(key: str, title: str, unit: str, meaning: str, values: Any, even: float) -> None:
        tables = {which: values(one) for which, one in seen.items()}
        own = tables.pop("")
        here = _numbers(seen[""].tensor("entropy", tower))
        found.append(Numbers(key, title, unit, meaning, here, own, tables, even))

    size = seen[""].tensor("entropy", tower).select(run=run, batch=row).values
    tokens = int((~size[0, 0].isnan()).sum())
    for name, (start, stop) in places.items():
        add(
            f"share {name}", f"Share of attention to {NAMED[name]}", "share of attention",
            f"The part of its attention that a head gives to {NAMED[name]}, as the mean over all "
            "tokens.",
            lambda one, name=name: one.tensor("share", tower)
            .select(run=run, batch=row, span=name).values.nanmean(-1),
            (stop - start) / tokens,
        )  # fmt: skip
    add(
        "entropy", "Entropy", "nats",
        "How widely a head spreads its attention: 0 is all on one token, higher is wider.",
        lambda one: one.tensor("entropy", tower).select(run=run, batch=row).values.nanmean(-1),
        math.log(tokens),
    )  # fmt: skip
    return tuple(found)


NAMED = {"class": "the class token", "patches": "the patches", "registers": "the registers"}


def _numbers(part: Any) -> tuple[int, ...]:
    return tuple(part.labels["layer"])


def layers_of_tower(model: nn.Module, tower: str, layers: Layers) -> Any:
    """What `observe` takes as layers for one tower; refused where the model has no such tower."""
    from attnbias.hub import sites

    have = [site.layer for site in sites(model) if site.tower == tower]
    if not have:
        towers = ", ".join(dict.fromkeys(site.tower for site in sites(model))) or "none"
        raise Refused(
            f"{type(model).__name__} has no {tower} tower that can be observed; its towers: "
            f"{towers}."
        )
    asked = have if isinstance(layers, str) and layers == "all" else list(layers)
    return {tower: [n for n in asked if n in have] or asked}


def untrained(model: nn.Module, seed: int) -> nn.Module:
    """The same class and config with weights as they are before training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh: nn.Module = type(model)(copy.deepcopy(model.config))
    like = next(model.parameters())
    return fresh.to(device=like.device, dtype=like.dtype).eval()


def moved(count: int, seed: int) -> Tensor:
    """An order in which every patch stands elsewhere: one random cycle."""
    cycle = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    order = torch.empty_like(cycle)
    order[cycle] = cycle.roll(1)
    return order


def shuffle_patches(
    inputs: Mapping[str, Any], grid: Grid, order: Tensor, image: int = 0
) -> dict[str, Any]:
    """The inputs with the patches of an image in another order: place n shows patch order[n]."""
    pixels = inputs["pixel_values"].clone()
    if pixels.ndim == 2:  # a line for each patch, in the tower's own order
        sizes = inputs["image_grid_thw"]
        start = int(sizes[:image].prod(-1).sum())
        at = start + grid.positions().flatten()
        pixels[at] = pixels[at[order]]
        return {**inputs, "pixel_values": pixels}
    high, wide = pixels.shape[-2] // grid.rows, pixels.shape[-1] // grid.columns
    whole = pixels[image, :, : grid.rows * high, : grid.columns * wide]
    cut = whole.unfold(1, high, high).unfold(2, wide, wide).flatten(1, 2)  # (C, patches, h, w)
    mixed = cut[:, order].unflatten(1, (grid.rows, grid.columns))
    whole.copy_(mixed.permute(0, 1, 3, 2, 4).reshape(whole.shape))
    return {**inputs, "pixel_values": pixels}


def picture(
    inputs: Mapping[str, Any], processor: Any, grid: Grid, image: int = 0, name: str = ""
) -> Picture:
    """The image as the model saw it, its colours brought back from the normalised inputs."""
    pixels = inputs["pixel_values"].detach().float().cpu()
    if pixels.ndim == 2:
        pixels = _from_lines(pixels, inputs, processor, grid, image)
    else:
        pixels = pixels[image]
    own = getattr(processor, "image_processor", processor)
    mean, deviation = getattr(own, "image_mean", None), getattr(own, "image_std", None)
    if mean is not None and deviation is not None and getattr(own, "do_normalize", True):
        shape = (-1, 1, 1)
        pixels = pixels * torch.tensor(deviation).reshape(shape) + torch.tensor(mean).reshape(shape)
    elif own is None or not getattr(own, "do_rescale", False):
        low, high = pixels.amin(), pixels.amax()
        pixels = (pixels - low) / (high - low).clamp_min(1e-12)
    if pixels.shape[0] == 1:
        pixels = pixels.expand(3, -1, -1)
    if pixels.shape[0] != 3:
        raise AttnbiasError(f"pixel_values has {pixels.shape[0]} channels; 1 or 3 can be shown.")
    return Picture((pixels.clamp(0, 1) * 255).round().byte().movedim(0, -1).contiguous(), name)


def _from_lines(
    pixels: Tensor, inputs: Mapping[str, Any], processor: Any, grid: Grid, image: int
) -> Tensor:
    """Qwen2-VL's lines of (channels, frames, height, width) as an image."""
    start = int(inputs["image_grid_thw"][:image].prod(-1).sum())
    lines = pixels[start + grid.positions().flatten()]
    own = getattr(processor, "image_processor", processor)
    frames = int(getattr(own, "temporal_patch_size", 2))
    side = math.isqrt(lines.shape[1] // (3 * frames))
    cut = lines.reshape(grid.rows, grid.columns, 3, frames, side, side)[:, :, :, 0]
    return cut.permute(2, 0, 3, 1, 4).reshape(3, grid.rows * side, grid.columns * side)
