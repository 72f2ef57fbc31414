"""ESMFold's trunk: triangle attention and sequence attention with biases read from the pairs."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnbias.fuse.door import Door
from attnbias.fuse.family import Family, Place
from attnbias.fuse.pair_products import Product, stands, transition, triangle_product, with_outer
from attnbias.fuse.pairs import (
    Heads,
    Triangle,
    TriangleFamily,
    carried,
    row_attention,
    takes,
    triangle_attention,
)

MODELS = "transformers.models.esm.modeling_esmfold"
BEST_CHUNK = 4  # rows at a time, of the stock code's triangle attention; measured


def parts(module: Any) -> Triangle:
    """The parts of an ``EsmFoldTriangleAttention``."""
    mha = module.mha
    heads = Heads(
        mha.no_heads,
        mha.linear_q,
        mha.linear_k,
        mha.linear_v,
        mha.linear_g,
        mha.linear_o,
        1 / math.sqrt(mha.c_hidden),
    )
    return Triangle(
        module.layer_norm, module.linear, heads, not module.starting, module.inf, carried(module)
    )


def triangle(
    module: Any,
    x: Tensor,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """In place of ``EsmFoldTriangleAttention.forward``; a chunk size is of no use here."""
    if x.ndim == 4 and takes(module, x, module.no_heads, x.shape[1]):
        out = triangle_attention(x, parts(module), mask)
        if out is not None:
            return out
    found: Tensor = type(module).forward(module, x, mask, chunk_size, *args, **kwargs)
    return found


class EsmFoldTriangle(TriangleFamily):
    r"""Triangle attention of ESMFold, around the starting and the ending node.

    .. math:: \mathrm{softmax}_k(q_{ij} \cdot k_{ik} / \sqrt{d} + w_h \cdot \mathrm{LN}(z)_{jk})

    The stock code builds the scores of all rows, or those of a chunk, and adds the bias to them.
    """

    name = "esmfold triangle"
    modules: ClassVar[tuple[str, ...]] = (f"{MODELS}.EsmFoldTriangleAttention",)
    parts: ClassVar[tuple[str, ...]] = (f"{MODELS}.EsmFoldAttention",)

    def triangle_of(self, module: Any) -> Triangle:
        return parts(module)

    def prepare(self, place: Place, door: Door) -> None:
        door.method(place.module, "forward", triangle)

    def example(
        self, place: Place, batch: int, length: int, generator: torch.Generator
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        module: Any = place.module
        weight = module.linear.weight
        z = torch.randn(batch, length, length, module.c_in, generator=generator).to(weight)
        keep = torch.ones(batch, length, dtype=torch.long, device=weight.device)
        keep[-1, length - length // 4 :] = 0 if batch > 1 else 1
        mask = keep.unsqueeze(2) * keep.unsqueeze(1)
        return (z,), {"mask": mask, "chunk_size": BEST_CHUNK}


def block(
    module: Any,
    sequence_state: Tensor,
    pairwise_state: Tensor,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """In place of the forward of ``EsmFoldTriangularSelfAttentionBlock``."""
    s, z = sequence_state, pairwise_state
    heads = module.seq_attention.num_heads
    if not _fits(module, s, z, mask) or not takes(module, z, heads, 1):
        found: tuple[Tensor, Tensor] = type(module).forward(
            module, s, z, mask=mask, chunk_size=chunk_size, **kwargs
        )
        return found
    s = s + module.drop(_sequence(module, module.layernorm_1(s), z, mask))
    s = module.mlp_seq(s)
    pair_mask = None if mask is None else mask.unsqueeze(2) * mask.unsqueeze(1)
    if torch.is_grad_enabled() or any(one.training for one in module.modules()):
        z = z + module.sequence_to_pair(s)
        z = z + module.row_drop(module.tri_mul_out(z, mask=pair_mask))
        z = z + module.col_drop(module.tri_mul_in(z, mask=pair_mask))
        more = {"mask": pair_mask, "chunk_size": chunk_size}
        z = z + module.row_drop(module.tri_att_start(z, **more))
        z = z + module.col_drop(module.tri_att_end(z, **more))
        return s, module.mlp_pair(z)
    return s, _pairs(module, s, z, pair_mask, chunk_size)


def _fits(module: Any, s: Tensor, z: Tensor, mask: Tensor | None) -> bool:
    """Whether shapes are those of a block; what is wrong the stock code says."""
    config = module.config
    if s.ndim != 3 or z.ndim != 4 or (mask is not None and mask.shape != s.shape[:2]):
        return False
    pairs = (s.shape[0], s.shape[1], s.shape[1], config.pairwise_state_dim)
    return s.shape[2] == config.sequence_state_dim and tuple(z.shape) == pairs


def _sequence(module: Any, x: Tensor, z: Tensor, mask: Tensor | None) -> Tensor:
    """The sequence attention of a block, with its bias read from the pairs."""
    own, to_bias = module.seq_attention, module.pair_to_sequence
    made = own.proj(x).view(*x.shape[:2], own.num_heads, -1).transpose(1, 2)
    query, key, value = made.chunk(3, dim=-1)
    out = row_attention(
        query, key, value, z, to_bias.layernorm, to_bias.linear, mask, own.rescale_factor
    )
    if own.gated:
        out = own.g_proj(x).sigmoid() * out
    projected: Tensor = own.o_proj(out)
    return projected


def _pairs(
    module: Any, s: Tensor, z: Tensor, mask: Tensor | None, chunk_size: int | None
) -> Tensor:
    """All that a block does to its pairs in eval mode: a new tensor, then changed in place."""
    from transformers.models.esm import modeling_esmfold as stock

    outer = module.sequence_to_pair
    if stands(outer, stock.EsmFoldSequenceToPair):
        query, key = outer.proj(outer.layernorm(s)).chunk(2, dim=-1)
        z = with_outer(z, query, key, outer.o_proj)
    else:
        z = z + outer(s)
    for product in (module.tri_mul_out, module.tri_mul_in):
        cast = torch.is_autocast_enabled(z.device.type)
        if stands(product, stock.EsmFoldTriangleMultiplicativeUpdate) and not cast:
            triangle_product(z, _product(product), mask)
        else:
            z += product(z, mask=mask)
    for child in (module.tri_att_start, module.tri_att_end):
        done = None
        if stands(child, stock.EsmFoldTriangleAttention):
            done = triangle_attention(z, parts(child), mask, into=z)
        if done is None:
            z += child(z, mask=mask, chunk_size=chunk_size)
    if stands(module.mlp_pair, stock.EsmFoldResidueMLP):
        transition(z, module.mlp_pair)
        return z
    changed: Tensor = module.mlp_pair(z)
    return changed


def _product(child: Any) -> Product:
    """The parts of an ``EsmFoldTriangleMultiplicativeUpdate``."""
    return Product(
        child.layer_norm_in,
        ((child.linear_a_p, child.linear_a_g), (child.linear_b_p, child.linear_b_g)),
        lambda x: child.linear_z(child.layer_norm_out(x)),
        lambda x: child.linear_g(x).sigmoid_(),
        not child._outgoing,
    )


class EsmFoldBlock(Family):
    r"""A block of ESMFold's trunk: sequence attention with a bias read from the pairs, and, without
    gradients, all of the pairs' side by blocks of rows.

    .. math:: \mathrm{softmax}_k(q_j \cdot k_k / \sqrt{d} + w_h \cdot \mathrm{LN}(z)_{jk})

    The maps that the stock sequence attention returns, and the block throws away, are not made.
    """

    name = "esmfold"
    form = "pair bias"
    modules: ClassVar[tuple[str, ...]] = (f"{MODELS}.EsmFoldTriangularSelfAttentionBlock",)
    parts: ClassVar[tuple[str, ...]] = (f"{MODELS}.EsmFoldSelfAttention",)
    least = 64 * 64
    longest = 192

    def prepare(self, place: Place, door: Door) -> None:
        door.method(place.module, "forward", block)

    def refuse(self, place: Place) -> str:
        from transformers.models.esm import modeling_esmfold as stock

        module: Any = place.module
        for child, kind in (
            (module.seq_attention, stock.EsmFoldSelfAttention),
            (module.pair_to_sequence, stock.EsmFoldPairToSequence),
        ):
            if not stands(child, kind):
                return f"its {type(child).__name__} was changed or is listened to by a hook."
        return ""

    def output(self, found: Any) -> Tensor:
        return torch.cat([one.flatten() for one in found])

    def example(
        self, place: Place, batch: int, length: int, generator: torch.Generator
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        config: Any = place.module.config
        weight: Any = place.module.layernorm_1.weight  # type: ignore[union-attr]
        s = torch.randn(batch, length, config.sequence_state_dim, generator=generator)
        z = torch.randn(batch, length, length, config.pairwise_state_dim, generator=generator)
        mask = torch.ones(batch, length, dtype=torch.long, device=weight.device)
        mask[-1, length - length // 4 :] = 0 if batch > 1 else 1
        return (s.to(weight), z.to(weight)), {"mask": mask, "chunk_size": BEST_CHUNK}
