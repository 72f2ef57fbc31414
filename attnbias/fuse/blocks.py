"""What LongT5's encoder hands from layer to layer: a window of buckets, padding, summed blocks."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from attnbias import forms
from attnbias.bias import Bias, GridRelative, Padding, Window, add
from attnbias.forms.t5 import t5_buckets
from attnbias.fuse.position import PositionBias

STOCK = "transformers.models.longt5.modeling_longt5"


class Blocks(PositionBias):
    """What travels from layer to layer in place of the tensor of blocks.

    It keeps the module whose table all layers share, not numbers made from it: under reentrant
    checkpointing the gradient of a later layer reaches the table only through the parameter.

    Args:
        source: the attention module that made it.
        mask: as the stack gave it. keep: real tokens ``(batch, length)``.
    """

    def __init__(self, source: Any, mask: Tensor, keep: Tensor) -> None:
        super().__init__(None, source.q.weight.dtype)
        self.source, self.mask, self.keep = source, mask, keep
        self.padded = not bool(keep.all())
        self._made: Any = None

    def local(self) -> Bias:
        """Window, buckets and padding between the tokens."""
        local: Bias = self._kept()[0]
        return local

    def _kept(self) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            return self._parts()
        if self._made is None:
            self._made = self._parts()
        made: tuple[Any, ...] = self._made
        return made

    def _parts(self) -> tuple[Any, ...]:
        source, length = self.source, self.keep.shape[1]
        reach = source.block_len - 1
        terms: list[Bias] = [Window(reach, reach, queries=length, keys=length, offset=0)]
        if source.has_relative_attention_bias:
            terms.append(
                forms.T5(
                    source.n_heads,
                    buckets=source.relative_attention_num_buckets,
                    max_distance=source.relative_attention_max_distance,
                    bidirectional=not source.is_decoder,
                    table=source.relative_attention_bias.weight,
                )(length)
            )
        if self.padded:
            terms.append(Padding(self.keep))
        return (add(*terms),)

    def tensor(self) -> Tensor:
        if self._tensor is None or (torch.is_grad_enabled() and not self._recorded):
            weight = self.source.q.weight
            nothing = weight.new_zeros(*self.keep.shape, self.source.d_model)
            made = type(self.source).forward(self.source, nothing, mask=self.mask)[1]
            self._tensor, self._recorded = made, torch.is_grad_enabled()
        return self._tensor

    def stock(self) -> Tensor:
        return self.tensor()

    @property
    def shape(self) -> torch.Size:
        return self.tensor().shape

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.source).__name__}, {tuple(self.keep.shape)})"


class GlobalBlocks(Blocks):
    """As `Blocks`, with the summed tokens: ``ids (batch, length)`` names the sum that a token is
    part of (-1: none), ``real (batch, sums)`` the sums that are seen.
    """

    def __init__(self, source: Any, mask: Tensor, keep: Tensor) -> None:
        super().__init__(source, mask, keep)
        stock = sys.modules[STOCK]
        ids, real = stock._make_global_fixed_block_ids(mask, source.global_block_size)
        self.ids, self.real = ids.long(), real.bool()
        self.sums = self.real.shape[1]

    def side(self) -> Bias:
        """The bias from tokens to sums."""
        side: Bias = self._kept()[1]
        return side

    def _parts(self) -> tuple[Any, ...]:
        local = super()._parts()
        if self.sums == 0:
            return (*local, None)
        source = self.source
        weight = source.global_relative_attention_bias.weight
        distance = torch.arange(-self.sums + 1, self.sums + 1, device=weight.device)
        index = t5_buckets(
            distance,
            buckets=source.relative_attention_num_buckets,
            max_distance=source.relative_attention_max_distance,
            bidirectional=not source.is_decoder,
        )
        table = weight.index_select(0, index).T
        ids = self.ids if self.padded else self.ids[:1]
        places = torch.arange(self.sums, device=weight.device)[:, None]
        side: Bias = GridRelative(table, ids[..., None], places, center=self.sums - 1)
        if not bool(self.real.all()):
            side = add(side, Padding(self.real))
        return (*local, side)

    def sums_of(self, hidden: Tensor) -> Tensor:
        """``(batch, sums, dim)``: the sum of the tokens of each block, without a matrix of ones."""
        batch, _, dim = hidden.shape
        rows = torch.where(self.ids < 0, self.sums, self.ids)
        rows = rows + (self.sums + 1) * torch.arange(batch, device=rows.device)[:, None]
        total = hidden.new_zeros(batch * (self.sums + 1), dim)
        total = total.index_add(0, rows.flatten(), hidden.reshape(-1, dim))
        return total.view(batch, self.sums + 1, dim)[:, :-1]
