"""Where the images and videos of ready model inputs stand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.hub.sites import unwrap

Span = tuple[int, int | None]
KINDS = ("image", "video")


def spans(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Spans of images, of videos and of what will be generated, read off the inputs of a model.

    An image is a run of the model's image token. Images that touch are told apart by the grids in
    the inputs (``image_grid_thw``) or by the number of tokens per image in the model's config.

    Args:
        model: a transformers model whose config names its image token.
        inputs: keyword arguments of one forward: ``input_ids (batch, length)``, and the
            ``attention_mask`` and grids where there are such.

    Returns:
        What ``ab.steer(model, ..., spans=)`` takes: "image 0", "image 1" and so on, "image" from
        the first of them to the last, the same for "video", and "generated". A span is ``(start,
        stop)``, or a list with one per row (None: the row has none). Positions count the real
        tokens of a row.

    Raises:
        AttnbiasError: the config names no image token, or there are no ``input_ids``.
    """
    root = unwrap(model)
    config = getattr(root, "config", None)
    known = {kind: _token(config, kind) for kind in KINDS}
    name = type(root).__name__
    if not any(known.values()):
        raise AttnbiasError(
            f"the config of {name} names no image token (image_token_id), so spans must be given "
            "by hand or by ab.prompt(processor, ..., image=)."
        )
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise AttnbiasError(
            f"inputs must hold input_ids (batch, length), got {', '.join(inputs) or 'nothing'}."
        )
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        mask = torch.ones_like(ids)
    rows = [line[keep.bool()] for line, keep in zip(ids, mask, strict=True)]
    found: dict[str, list[Span | None]] = {}
    for kind, token in known.items():
        if token is None:
            continue
        sizes = _sizes(config, kind, inputs)
        for number, row in enumerate(rows):
            parts = _parts((row == token).tolist(), sizes, _each(config, kind))
            named = {f"{kind} {k}": part for k, part in enumerate(parts)}
            if parts:
                named[kind] = (parts[0][0], parts[-1][1])
            for key, part in named.items():
                found.setdefault(key, [None] * len(rows))[number] = part
    found["generated"] = [(len(row), None) for row in rows]
    return {
        key: values[0] if all(one == values[0] for one in values) else values
        for key, values in found.items()
    }


def _token(config: Any, kind: str) -> int | None:
    for name in (f"{kind}_token_id", f"{kind}_token_index"):
        number = getattr(config, name, None)
        if isinstance(number, int):
            return number
    return None


def _sizes(config: Any, kind: str, inputs: Mapping[str, Any]) -> list[int]:
    """Tokens of each image in the batch, in order, where the inputs tell."""
    grid = inputs.get(f"{kind}_grid_thw")
    if not isinstance(grid, Tensor):
        return []
    merge = int(getattr(getattr(config, "vision_config", None), "spatial_merge_size", 1))
    return [int(one.prod()) // merge**2 for one in grid]


def _each(config: Any, kind: str) -> int:
    """Tokens of every image, where the config tells; 0 elsewhere."""
    for name in ("mm_tokens_per_image", "image_seq_length"):
        number = getattr(config, name, None)
        if kind == "image" and isinstance(number, int):
            return number
    return 0


def _parts(chosen: list[bool], sizes: list[int], each: int) -> list[tuple[int, int]]:
    """The runs of `chosen`, cut where one image ends and the next begins; takes from `sizes`."""
    runs, start = [], None
    for place, here in enumerate([*chosen, False]):
        if here and start is None:
            start = place
        elif not here and start is not None:
            runs.append((start, place))
            start = None
    found = []
    for begin, stop in runs:
        while begin < stop:
            left = stop - begin
            if sizes and 0 < sizes[0] <= left:
                size = sizes.pop(0)
            else:  # a number that does not fit tells nothing about this run
                size = each if each and left % each == 0 else left
            found.append((begin, begin + size))
            begin += size
    return found
