"""BEiT and Data2Vec for images: a table of displacements of patches, and a class token."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnbias.bias import GridRelative, add
from attnbias.fuse import modes
from attnbias.fuse.door import MARK, Door
from attnbias.fuse.family import Family, Place, Size, compute
from attnbias.fuse.position import PositionBias
from attnbias.hub.request import MaskRequest

_BEIT = "transformers.models.beit.modeling_beit"
_DATA2VEC = "transformers.models.data2vec.modeling_data2vec_vision"
FAMILY = "_attnbias_family"


class ImageBias(PositionBias):
    """The bias of an image on its way from a layer, or from the model, to the attention."""

    def __add__(self, other: Any) -> Any:
        if isinstance(other, ImageBias):
            if isinstance(other, MadeBias):
                return other + self
            assert self.bias is not None
            assert other.bias is not None
            return ImageBias(add(self.bias, other.bias), self.dtype)
        if isinstance(other, MaskRequest):
            # A mask that hides something is added as the stock code adds it, whatever comes of it.
            mask = other.stock(other.original or "sdpa")
            return self if mask is None else self.tensor() + mask
        return super().__add__(other)


class MadeBias(ImageBias):
    """The stock code's tensor on the same way: a mask that hides nothing is not added to it."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(None, tensor.dtype)
        self._whole = tensor

    def tensor(self) -> Tensor:
        return self._whole

    stock = tensor

    def __add__(self, other: Any) -> Any:
        if isinstance(other, ImageBias):
            return MadeBias(self._whole + other.tensor())
        return super().__add__(other)


def image_bias(table: Tensor, known: tuple[int, int], size: tuple[int, int]) -> GridRelative:
    """The bias of ``size`` patches and a class token before them, from the stock module's table.

    Args:
        table: ``((2 H - 1)(2 W - 1) + 3, heads)`` for the patches ``known = (H, W)``.
    """
    tall, wide = (2 * one - 1 for one in known)
    # The stock code exchanges height and width before it resizes; for squares that is the same.
    grid = table[:-3].T.reshape(1, -1, wide, tall)
    wanted = tuple(2 * one - 1 for one in size)
    if grid.shape[2:] != wanted:
        grid = F.interpolate(grid, size=wanted, mode="bilinear")
    to_patch, from_patch, itself = table[-3:]
    unread = torch.zeros_like(itself)
    specials = torch.stack([itself, to_patch, from_patch, unread], -1).reshape(-1, 2, 2)
    return GridRelative(grid[0].flip((1, 2)), size, specials=specials)


def bias_forward(
    module: Any, window_size: Any, interpolate_pos_encoding: bool = False, dim_size: Any = None
) -> Any:
    """In place of the forward of the module with the table: the structure, not its tensor."""
    family: Beit = getattr(module, FAMILY)
    table = module.relative_position_bias_table
    tokens = window_size[0] * window_size[1] + 1
    resized = interpolate_pos_encoding and dim_size != tokens
    if resized or not family.structured(tokens, table):
        made = type(module).forward(module, window_size, interpolate_pos_encoding, dim_size)
        return MadeBias(made)
    return ImageBias(image_bias(table, tuple(module.window_size), tuple(window_size)), table.dtype)


class Beit(Family):
    r"""The attention of BEiT.

    .. math:: \mathrm{softmax}(q_i \cdot k_j / \sqrt d + W[y_i - y_j, x_i - x_j, h])

    with three more entries for the class token, which has no place; for another image size the
    table is resized bilinearly, as transformers does. Each layer has a table, or all share one, or
    both. The stock code makes a tensor of all pairs of patches from every table at every call.

    Source: Bao et al., "BEiT: BERT Pre-Training of Image Transformers", 2022, arXiv 2106.08254.
    """

    name = "beit"
    form = "table of patches and a class token"
    modules: ClassVar[tuple[str, ...]] = (f"{_BEIT}.BeitAttention",)
    least = 256 * 256

    def refuse(self, place: Place) -> str:
        return "" if list(self.tables(place)) else "it has no relative position bias."

    def tables(self, place: Place) -> Iterator[nn.Module]:
        """The modules whose tables this attention is given: its layer's own, the shared one."""
        for module in place.owner.modules():
            for name, child in module.named_children():
                own = name == "relative_position_bias" and module is not place.owner
                mine = getattr(module, "attention", None) is place.module
                if (own and mine) or name == "shared_position_bias":
                    yield child

    def structured(self, tokens: int, table: Tensor) -> bool:
        """Whether the bias of so many tokens is made as a structure."""
        wanted = modes.route()
        if wanted is not None:
            return wanted == "fused"
        return table.device.type == "cpu" and tokens**2 >= self.least

    def prepare(self, place: Place, door: Door) -> None:
        for module in self.tables(place):
            door.set(module, FAMILY, self)
            door.method(module, "forward", bias_forward)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        original: str,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> Tensor | None:
        if not isinstance(mask, ImageBias) or isinstance(mask, MadeBias):
            return None
        if not self.takes(Size.of(query, key)):
            return None
        return compute(query, key, value, mask.bias, scale=scaling, dropout=dropout)

    def example(
        self, place: Place, batch: int, length: int, generator: torch.Generator
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        module: Any = place.module
        size = patches(length)
        made = [table(size) for table in self.tables(place)]
        weight = next(module.parameters())
        hidden = torch.randn(batch, size[0] * size[1] + 1, weight.shape[1], generator=generator).to(
            weight
        )
        return (hidden, made[0] if len(made) == 1 else made[0] + made[1]), {}


def patches(length: int) -> tuple[int, int]:
    """Sides of an image with about so many tokens."""
    height = max(1, math.isqrt(length - 1))
    return height, max(1, (length - 1) // height)


@functools.cache
def _signature(kind: Any) -> inspect.Signature:
    return inspect.signature(kind.forward)


def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of the forward of a self-attention that computes its scores itself."""
    kind: Any = type(module)
    family: Data2VecVision = getattr(module, MARK).family
    bound = _signature(kind).bind(module, *args, **kwargs)
    given = bound.arguments
    hidden, shared = given["hidden_states"], given.get("relative_position_bias")
    made = [] if shared is None else [shared]
    asked = bool(given.get("output_attentions")) or given.get("head_mask") is not None
    query, key, value = (
        one(hidden).view(*hidden.shape[:2], module.num_attention_heads, -1).transpose(1, 2)
        for one in (module.query, module.key, module.value)
    )
    taken = not asked and family.takes(Size.of(query, key))
    if taken and getattr(module, "has_relative_position_bias", True):
        sides = (one // module.config.patch_size for one in given["resolution"])
        interpolate = given.get("interpolate_pos_encoding", False)
        own = module.relative_position_bias(tuple(sides), interpolate, dim_size=hidden.shape[1])
        made.append(own)
    if not taken or not all(isinstance(one, ImageBias) and one.bias is not None for one in made):
        if isinstance(shared, PositionBias):
            given["relative_position_bias"] = shared.stock()
        return kind.forward(*bound.args, **bound.kwargs)
    dropout = module.dropout.p if module.training else 0.0
    out = compute(query, key, value, add(*(one.bias for one in made)), dropout=dropout)
    return (out.flatten(2), None) if "Sdpa" in kind.__name__ else (out.flatten(2),)


class Data2VecVision(Beit):
    r"""The attention of Data2Vec for images, and of BEiT in older versions of transformers.

    The bias is that of `Beit`; the shared table is the encoder's.

    Source: Baevski et al., "data2vec: A General Framework for Self-supervised Learning in Speech,
    Vision and Language", 2022, arXiv 2202.03555; transformers' classes.
    """

    name = "data2vec vision"
    modules: ClassVar[tuple[str, ...]] = (
        f"{_DATA2VEC}.Data2VecVisionSelfAttention",
        f"{_DATA2VEC}.Data2VecVisionSdpaSelfAttention",
        f"{_BEIT}.BeitSelfAttention",
        f"{_BEIT}.BeitSdpaSelfAttention",
    )

    def tables(self, place: Place) -> Iterator[nn.Module]:
        own = getattr(place.module, "relative_position_bias", None)
        if own is not None:
            yield own
        for module in place.owner.modules():
            if hasattr(module, "layer") and hasattr(module, "relative_position_bias"):
                yield module.relative_position_bias  # type: ignore[misc]

    def prepare(self, place: Place, door: Door) -> None:
        super().prepare(place, door)
        door.method(place.module, "forward", forward)

    def example(
        self, place: Place, batch: int, length: int, generator: torch.Generator
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        module: Any = place.module
        size = patches(length)
        weight = module.query.weight
        hidden = torch.randn(batch, size[0] * size[1] + 1, weight.shape[1], generator=generator).to(
            weight
        )
        made = [one(size) for one in self.tables(place) if one is not self.own(module)]
        more = {"relative_position_bias": made[0]} if made else {}
        patch = module.config.patch_size
        return (hidden,), {"resolution": (size[0] * patch, size[1] * patch), **more}

    def own(self, module: Any) -> Any:
        return getattr(module, "relative_position_bias", None)
