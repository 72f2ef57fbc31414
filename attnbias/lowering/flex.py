"""PyTorch's FlexAttention with functions made from a bias: one GPU kernel for each structure.

The score function adds the entries of all terms, the mask function hides keys, and a `BlockMask`
skips blocks that masks leave empty (`flex_blocks` finds them from the structure, without building
the mask). A function is made, and compiled, once for each structure, format and number of heads:
tensors, and numbers such as an offset, are its arguments. On the CPU FlexAttention compiles no
log-sum-exp and no backward, so there it runs uncompiled, with every score built: for tests.

Gradients to what the score function reads are sums by atomic additions on a GPU, so, unlike those
of every other lowering, they may differ in their last bits from run to run.

Source: Dong et al., "Flex Attention: A Programming Model for Generating Optimized Attention
Kernels", 2024, arXiv 2412.05496.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from attnbias import kernels
from attnbias.errors import Refused
from attnbias.lowering import flash, flex_blocks, flex_entries, flex_parts
from attnbias.lowering.flex_parts import Part
from attnbias.lowering.problem import Lowering, Offer, Problem

UNCOMPILED = 1e5  # on a CPU every score is built: never the cheapest, and no candidate
# Over the same attention without a bias, from what others measured (never yet measured here): a
# table is read at 344 to 386 of 487 Tflop/s (pytorch issue 138493).
COMPILED = 1.4
# 4.3 s of backward to 0.053 s of forward for five exponentials with gradients (the test of BSA-TNP
# against FlexAttention, 4,096 tokens).
ATOMICS = 40.0
LEAST, WIDEST = 16, 256  # features of a head that its kernels take
TRAINS = ("cuda",)  # where it has a backward
# What is read for each pair of places is staged in shared memory beside keys and values, 64 kB for
# each stage: with PyTorch's own three stages more than a card has (`benchmarks.flex_kernels`).
PAIRS = ("strip", "whole", "buckets", "strips", "grid", "turned")
HALF = (torch.float16, torch.bfloat16, torch.float32)


class Flex(Lowering):
    """Softmax with every bias whose entries are a formula of two places; no dropout.

    Memory O(queries + keys) beside the parameters and the blocks of a mask; on a CPU all scores.
    """

    name = "flex"

    def offer(self, problem: Problem) -> Offer:
        if kernels.switched_off():
            return self.refuse("the kernels are switched off")
        kind, dtype = problem.query.device.type, problem.query.dtype
        if kind not in ("cpu", "cuda", "meta"):
            return self.refuse(f"FlexAttention is not known to run on {kind}")
        if kind == "cuda" and dtype not in HALF:
            return self.refuse(f"FlexAttention's kernels compute no {str(dtype)[6:]}")
        if kind == "cuda" and max(problem.query.shape[-1], problem.value.shape[-1]) > WIDEST:
            return self.refuse(f"FlexAttention's kernels take heads of at most {WIDEST} features")
        if kind not in TRAINS and (problem.gradient or problem.bias_gradient):
            return self.refuse("FlexAttention computes no gradients on a CPU")
        for term in [] if problem.bias is None else problem.bias.terms():
            why = flex_parts.reason(term, problem.bias_gradient)
            if why:
                return self.refuse(f"{why}: lowering='triton', 'stream' or 'tiled' takes it")
        if kind != "cuda":
            scores = problem.batch * problem.heads * problem.queries * problem.keys
            return self.bid(UNCOMPILED, 4 * 4 * scores, "FlexAttention, uncompiled on a CPU")
        blocks = 2 * 4 * problem.batch * (problem.queries // 128 + 1) * (problem.keys // 128 + 1)
        if problem.bias_gradient:
            words = "FlexAttention; gradients to the bias by atomic additions, not bit for bit"
            return self.bid(ATOMICS, blocks, words)
        return self.bid(COMPILED, blocks, "FlexAttention, a kernel generated for this structure")

    def answer(self, problem: Problem) -> Offer:
        # Its own backward gives the gradients to the bias: the price is in the offer.
        if problem.normaliser == "softmax" and not problem.dropout:
            return self.offer(problem)
        return super().answer(problem)

    def run(self, problem: Problem) -> tuple[Tensor, Tensor]:
        query, key, value = problem.query, problem.key, problem.value
        if problem.empty or value.shape[-1] == 0:
            return flash.flash(query, key, value, scale=problem.scale)
        width = value.shape[-1]
        if query.device.type == "cuda":
            query, key, value = (_at_least(t, LEAST) for t in (query, key, value))
        terms = [] if problem.bias is None else problem.bias.terms()
        hide = [t for t in terms if flex_parts.masks(t)]
        scores = [flex_parts.part(t, query.device) for t in terms if not flex_parts.masks(t)]
        masks = [flex_parts.part(t, query.device) for t in hide]
        lists: tuple[Tensor, ...] = ()
        if hide:
            lists = _lists(flex_blocks.blocks(hide, problem.queries, problem.keys, query.device))
        tensors = [part.tensors for part in (*scores, *masks)]
        made = compiled(
            Structure(
                tuple(part.kind for part in scores),
                tuple(part.kind for part in masks),
                problem.scale,
                query.device.type,
                _looks(query, key, value, *(t for own in tensors for t in own)),
            )
        )
        rules = tuple(part.function for part in masks)
        try:
            out, lse = made(query, key, value, tensors, rules, lists)
        except Exception as error:
            if any(rules) and type(error).__module__.startswith("torch._"):
                raise Refused(
                    "lowering 'flex' could not trace the function of a MaskFunction: write it in "
                    "PyTorch operations on four numbers, or use lowering='stream'."
                ) from error
            raise
        return out[..., :width], lse


class Structure(NamedTuple):
    """What a function is made for. Lengths are not in it.

    looks: dtype, number of dimensions and need of a gradient of each tensor, heads and sizes.
    """

    scores: tuple[Any, ...]
    masks: tuple[Any, ...]
    scale: float
    device: str
    looks: tuple[Any, ...]


def _looks(query: Tensor, key: Tensor, value: Tensor, *tensors: Tensor) -> tuple[Any, ...]:
    needs = torch.is_grad_enabled()
    sizes = [(t.shape[1], t.shape[3]) for t in (query, key, value)]
    each = [(t.dtype, t.ndim, needs and t.requires_grad) for t in (query, key, value, *tensors)]
    return (needs, *sizes, *each)


@functools.lru_cache(maxsize=512)
def compiled(structure: Structure) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function of a structure ``(query, key, value, tensors, rules, lists)``, compiled on a
    GPU when it is first called.
    """
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

    scores, masks, scale = structure.scores, structure.masks, structure.scale
    pairs = sum(kind[0] in PAIRS for kind in scores)
    stages = {"fwd_num_stages": 2 if pairs == 1 else 1, "bwd_num_stages": 1}
    options = stages if pairs else None

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tensors: list[tuple[Tensor, ...]],
        rules: tuple[Callable[..., Any] | None, ...],
        lists: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor]:
        def score(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            for place, kind in enumerate(scores):
                score = flex_entries.add(score, kind, tensors[place], b, h, q, k)
            return score

        def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = k >= 0
            for place, kind in enumerate(masks):
                own = tensors[len(scores) + place]
                seen = seen & flex_entries.sees(kind, own, rules[place], b, h, q, k)
            return seen

        block = None
        if masks:
            make: Any = BlockMask
            block = make(
                (query.shape[2], key.shape[2]),
                *lists,
                BLOCK_SIZE=(flex_blocks.SIZE, flex_blocks.SIZE),
                mask_mod=sees,
            )
        run: Any = flex_attention
        out, more = run(
            query,
            key,
            value,
            score_mod=score if scores else None,
            block_mask=block,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
            kernel_options=options,
            return_aux=AuxRequest(lse=True),
        )
        return out, more.lse

    # Compiled functions are counted, and limited, by their code object: each structure has its own.
    code = attend.__code__.replace(co_name=f"attend_{hash(structure) & 0xFFFFFFFF:08x}")
    own = types.FunctionType(
        code, attend.__globals__, code.co_name, attend.__defaults__, attend.__closure__
    )
    backend = "inductor" if structure.device == "cuda" else "eager"
    made: Callable[..., tuple[Tensor, Tensor]] = torch.compile(own, backend=backend, fullgraph=True)
    return made


def _lists(blocks: flex_blocks.Blocks) -> tuple[Tensor, ...]:
    """Blocks seen in part and as a whole, by rows and by columns: what a `BlockMask` lists."""
    part, whole = blocks.possible & ~blocks.whole, blocks.whole & blocks.possible
    sides = (part, whole, part.mT, whole.mT)
    return tuple(t for side in sides for t in flex_blocks.ordered(side))


def _at_least(tensor: Tensor, size: int) -> Tensor:
    """Columns of zeros until there are enough."""
    missing = size - tensor.shape[-1]
    return F.pad(tensor, (0, missing)) if missing > 0 else tensor


__all__ = ["Flex", "Part", "Structure", "compiled"]
