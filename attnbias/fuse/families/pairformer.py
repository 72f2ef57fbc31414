"""The Pairformer of AlphaFold 3, as `attnbias.fuse.plain.pairformer` writes it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from attnbias.fuse.door import Door
from attnbias.fuse.family import Family, Place
from attnbias.fuse.pair_products import Product, stands, transition, triangle_product
from attnbias.fuse.pairs import (
    Heads,
    Triangle,
    TriangleFamily,
    carried,
    row_attention,
    takes,
    triangle_attention,
)
from attnbias.fuse.plain import pairformer as stock

BEST_CHUNK = 4  # rows at a time, of the stock code's triangle attention; measured


def parts(module: stock.TriangleAttention) -> Triangle:
    """The parts of a ``TriangleAttention``."""
    heads = Heads(
        module.heads,
        module.query,
        module.key,
        module.value,
        module.gate,
        module.out,
        module.size**-0.5,
    )
    return Triangle(module.norm, module.bias, heads, module.ending, stock.INFINITY, carried(module))


def triangle(
    module: stock.TriangleAttention,
    z: Tensor,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """In place of ``TriangleAttention.forward``; a chunk size is of no use here."""
    if takes(module, z, module.heads, z.shape[1]):
        out = triangle_attention(z, parts(module), mask)
        if out is not None:
            return out
    return type(module).forward(module, z, mask, chunk_size)


def _tokens(module: stock.AttentionPairBias, s: Tensor, z: Tensor, keep: Tensor | None) -> Tensor:
    """The attention of the tokens of a block, with its bias read from the pairs."""
    s = module.norm(s)
    query, key, value = (
        one(s).unflatten(-1, (module.heads, module.size)).transpose(1, 2)
        for one in (module.query, module.key, module.value)
    )
    scale = module.size**-0.5
    found = row_attention(query, key, value, z, module.norm_pair, module.bias, keep, scale)
    out: Tensor = module.out(module.gate(s).sigmoid() * found)
    return out


def block(
    module: stock.PairformerBlock,
    s: Tensor,
    z: Tensor,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """In place of ``PairformerBlock.forward``."""
    if not takes(module, z, module.attention.heads, 1):
        return type(module).forward(module, s, z, mask, chunk_size)
    pairs = None if mask is None else mask[:, :, None] * mask[:, None, :]
    if torch.is_grad_enabled() or any(one.training for one in module.modules()):
        z = module.pairs(z, pairs, chunk_size)
    else:
        z = _pairs_side(module, z.clone(), pairs, chunk_size)
    s = s + _tokens(module.attention, s, z, mask)
    return s + module.single_transition(s), z


def _pairs_side(
    module: stock.PairformerBlock, z: Tensor, pairs: Tensor | None, chunk_size: int | None
) -> Tensor:
    """All that a block does to its pairs in eval mode, in place."""
    for product in (module.product_out, module.product_in):
        if stands(product, stock.TriangleMultiplication) and not _casts(z):
            triangle_product(z, _product(product), pairs)
        else:
            z += product(z, pairs)
    for child in (module.attention_start, module.attention_end):
        done = None
        if stands(child, stock.TriangleAttention):
            done = triangle_attention(z, parts(child), pairs, into=z)
        if done is None:
            z += child(z, pairs, chunk_size)
    if stands(module.pair_transition, stock.Transition):
        transition(z, lambda x: x + module.pair_transition(x))
    else:
        z += module.pair_transition(z)
    return z


def _casts(z: Tensor) -> bool:
    return torch.is_autocast_enabled(z.device.type)


def _product(child: stock.TriangleMultiplication) -> Product:
    """The parts of a ``TriangleMultiplication``."""
    return Product(
        child.norm,
        ((child.left, child.left_gate), (child.right, child.right_gate)),
        lambda x: child.out(child.norm_out(x)),
        lambda x: child.gate(x).sigmoid_(),
        child.incoming,
    )


def _pairs(size: int, batch: int, length: int, generator: torch.Generator) -> Tensor:
    return torch.randn(batch, length, length, size, generator=generator)


def _keep(batch: int, length: int) -> Tensor:
    keep = torch.ones(batch, length)
    keep[1:, length - length // 4 :] = 0
    return keep


class PairformerTriangle(TriangleFamily):
    r"""Triangle attention of a Pairformer, around the starting and the ending node.

    .. math:: \mathrm{softmax}_k(q_{ij} \cdot k_{ik} / \sqrt{c} + w_h \cdot \mathrm{LN}(z)_{jk})
    """

    name = "pairformer triangle"
    modules: ClassVar[tuple[str, ...]] = (f"{stock.__name__}.TriangleAttention",)

    def triangle_of(self, module: Any) -> Triangle:
        return parts(module)

    def prepare(self, place: Place, door: Door) -> None:
        door.method(place.module, "forward", triangle)

    def example(
        self, place: Place, batch: int, length: int, generator: torch.Generator
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        weight: Any = place.module.bias.weight  # type: ignore[union-attr]
        z = _pairs(weight.shape[1], batch, length, generator).to(weight)
        keep = _keep(batch, length).to(weight)
        mask = keep[:, :, None] * keep[:, None]
        return (z,), {"mask": mask, "chunk_size": BEST_CHUNK}


class PairformerBlocks(Family):
    r"""A block of a Pairformer: attention of the tokens with a bias read from their pairs, and,
    without gradients, all of the pairs' side by blocks of rows.

    .. math:: \mathrm{softmax}_k(q_j \cdot k_k / \sqrt{c} + w_h \cdot \mathrm{LN}(z_{jk}))
    """

    name = "pairformer"
    form = "pair bias"
    modules: ClassVar[tuple[str, ...]] = (f"{stock.__name__}.PairformerBlock",)
    parts: ClassVar[tuple[str, ...]] = (f"{stock.__name__}.AttentionPairBias",)
    least = 64 * 64
    longest = 192

    def prepare(self, place: Place, door: Door) -> None:
        door.method(place.module, "forward", block)

    def refuse(self, place: Place) -> str:
        child: Any = place.module.attention
        if not stands(child, stock.AttentionPairBias):
            return f"its {type(child).__name__} was changed or is listened to by a hook."
        return ""

    def output(self, found: Any) -> Tensor:
        return torch.cat([one.flatten() for one in found])

    def example(
        self, place: Place, batch: int, length: int, generator: torch.Generator
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        module: Any = place.module
        weight = module.pair_transition.out.weight
        s = torch.randn(batch, length, module.single, generator=generator).to(weight)
        z = _pairs(module.pair, batch, length, generator).to(weight)
        mask = _keep(batch, length).to(weight)
        return (s, z), {"mask": mask, "chunk_size": BEST_CHUNK}
