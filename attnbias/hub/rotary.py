"""The rotary embedding of a layer, as its model's own file applies it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from attnbias.errors import Refused
from attnbias.hub.sites import Site, calling_function

_APPLY = "apply_rotary_pos_emb"
# Kinds whose frequencies depend on the length that the model has seen so far.
_MOVING = ("dynamic", "longrope")


def rotate(root: nn.Module, site: Site, module: nn.Module, vectors: Tensor, by: Tensor) -> Tensor:
    r"""Rotate queries or keys that are already rotated by further positions.

    .. math:: R_{p + d}\, x = R_d\, (R_p\, x)

    Args:
        root: the (unwrapped) model. site, module: where it attends.
        vectors: ``(batch, heads, length, dim)``, float32 or float64.
        by: d, whole numbers ``(batch | 1, length)``, also below 0.

    Raises:
        Refused: no rotary embedding that could be found, one whose frequencies change with the
            length, or one with positions on several axes.
    """
    embedding = _embedding(root, site)
    apply = _apply(module)
    if embedding is None or apply is None:
        raise Refused(
            f"{site} has no rotary embedding that could be moved to other positions: use an option "
            "that keeps positions, such as positions='text'."
        )
    kind, own = _kind(embedding, module)
    if kind in _MOVING:
        raise Refused(
            f"{site} has a rotary embedding of kind {kind!r}, whose frequencies change with the "
            "length, so its keys cannot be moved: use positions='text'."
        )
    if hasattr(embedding, "mrope_section"):
        raise Refused(
            f"{site} has positions on several axes, which one distance cannot move: use "
            "positions='text'."
        )
    with torch.no_grad():
        cos, sin = embedding(vectors[..., :1].float(), by.expand(vectors.shape[0], -1), **own)
    # Lengths of vectors may be scaled together with the angle: that has happened already.
    factor = float((cos.double().square() + sin.double().square()).mean().sqrt()) or 1.0
    cos, sin = (part.to(vectors.dtype) / factor for part in (cos, sin))
    found: Tensor = apply(vectors, vectors, cos, sin)[0]
    return found


def _embedding(root: nn.Module, site: Site) -> nn.Module | None:
    """The nearest module with rotary frequencies, up from the site."""
    for parent in _parents(root, site):
        for name, child in parent.named_children():
            # A model with two of them (local and global layers) tells them apart by name.
            if "rotary" in type(child).__name__.lower() and "local" not in name:
                return child
    return None


def _parents(root: nn.Module, site: Site) -> Iterator[nn.Module]:
    """The modules around a site, the nearest first."""
    chain = [(name, module) for name, module in root.named_modules()]
    path = next((n for n, _ in chain if n == site.name or n.endswith(f".{site.name}")), site.name)
    around = [module for name, module in chain if not name or f"{path}.".startswith(f"{name}.")]
    return iter(around[::-1])


def _apply(module: nn.Module) -> Callable[..., Any] | None:
    function = calling_function(type(module))
    found = None if function is None else function.__globals__.get(_APPLY)
    return found if callable(found) else None


def _kind(embedding: nn.Module, module: nn.Module) -> tuple[str, dict[str, Any]]:
    """The kind of frequencies, and what else the embedding wants to know of the layer."""
    kind: Any = getattr(embedding, "rope_type", "default")
    asked = inspect.signature(embedding.forward).parameters
    if "layer_type" not in asked:
        return (kind if isinstance(kind, str) else "default"), {}
    layer = getattr(module, "layer_type", None)
    if layer is None:
        layer = module.config.layer_types[module.layer_idx]  # type: ignore[union-attr, index]
    if isinstance(kind, dict):
        kind = kind.get(layer, "default")
    return str(kind), {"layer_type": layer}
