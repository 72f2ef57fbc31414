"""LongT5: attention in a window, and in a window with a few summed tokens of the whole text."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnbias.attention import attention, explain, merge
from attnbias.bias import Bias
from attnbias.fuse import modes
from attnbias.fuse.blocks import STOCK, Blocks, GlobalBlocks
from attnbias.fuse.door import MARK, Door
from attnbias.fuse.families.t5 import T5
from attnbias.fuse.family import Family, Place, Size, compute

# The stock code takes the softmax in float32, and in float16 its -1e10 is minus infinity.
_DTYPES = (torch.float32, torch.bfloat16)


def local_forward(
    module: Any,
    hidden_states: Tensor,
    mask: Any = None,
    position_bias: Any = None,
    output_attentions: bool = False,
) -> Any:
    """In place of ``LongT5LocalAttention.forward``."""
    family: LongT5 = module._attnbias_fused.family
    blocks = family.blocks(module, hidden_states, mask, position_bias, output_attentions)
    if blocks is None:
        return type(module).forward(module, hidden_states, mask, position_bias, output_attentions)
    query, key, value = (_heads(module, one(hidden_states)) for one in _maps(module))
    dropout = module.dropout if module.training else 0.0
    out = compute(query, key, value, blocks.local(), scale=1.0, dropout=dropout)
    if blocks.padded:
        total = _near(value, module.block_len) / (3 * module.block_len)
        out = torch.where(blocks.keep[:, :, None, None], out, total.transpose(1, 2))
    return module.o(out.flatten(2)), blocks


def global_forward(
    module: Any,
    hidden_states: Tensor,
    mask: Any = None,
    position_bias: Any = None,
    output_attentions: bool = False,
) -> Any:
    """In place of ``LongT5TransientGlobalAttention.forward``."""
    family: LongT5Global = module._attnbias_fused.family
    blocks = family.blocks(module, hidden_states, mask, position_bias, output_attentions)
    if blocks is None:
        return type(module).forward(module, hidden_states, mask, position_bias, output_attentions)
    assert isinstance(blocks, GlobalBlocks)
    query, key, value = (_heads(module, one(hidden_states)) for one in _maps(module))
    sums = module.global_input_layer_norm(blocks.sums_of(hidden_states))
    side_key, side_value = (_heads(module, one(sums)) for one in (module.k, module.v))
    dropout = module.dropout if module.training else 0.0
    parts = [_part(query, key, value, blocks.local(), dropout)]
    if blocks.sums:
        parts.append(_part(query, side_key, side_value, blocks.side(), dropout))
    out = merge(parts)[0] if len(parts) > 1 else parts[0][0]
    if blocks.padded:
        total = _near(value, module.block_len) + side_value.sum(2, keepdim=True)
        total = total / (3 * module.block_len + blocks.sums)
        # A token that is no token sees the sums that are none: they are zero.
        total = torch.where(blocks.real.all(1)[:, None, None, None], total, 0.0)
        out = torch.where(blocks.keep[:, None, :, None], out, total)
    return module.o(out.transpose(1, 2).flatten(2)), blocks


def _maps(module: Any) -> tuple[Any, Any, Any]:
    return module.q, module.k, module.v


def _heads(module: Any, states: Tensor) -> Tensor:
    return states.view(*states.shape[:2], module.n_heads, module.key_value_proj_dim).transpose(1, 2)


def _part(
    query: Tensor, key: Tensor, value: Tensor, bias: Bias, dropout: float
) -> tuple[Tensor, Tensor]:
    """Attention to one set of keys, with its log-sum-exp."""
    seen = modes.record()
    if seen is not None:
        shape = explain(query, key, value, bias=bias, scale=1.0, dropout=dropout)
        seen.append((repr(bias), shape.chosen))
    found = attention(query, key, value, bias=bias, scale=1.0, dropout=dropout, return_lse=True)
    assert isinstance(found, tuple)
    return found


def _near(value: Tensor, block: int) -> Tensor:
    """``(batch, heads, length, dim)``: of each token the sum of the values of its block and the
    two beside it. The stock code gives a token that is none (padding) their mean.
    """
    length = value.shape[2]
    padded = nn.functional.pad(value, (0, 0, 0, -length % block))
    own = nn.functional.pad(
        padded.view(*value.shape[:2], -1, block, value.shape[3]).sum(3), (0, 0, 1, 1)
    )
    near = own[:, :, :-2] + own[:, :, 1:-1] + own[:, :, 2:]
    return near.repeat_interleave(block, 2)[:, :, :length]


class LongT5(Family):
    r"""The local attention of LongT5's encoder.

    .. math:: \mathrm{softmax}_{|j - i| \le r}(q_i \cdot k_j + W[\mathrm{bucket}(j - i), h])

    The stock code cuts the text into blocks, and gives each of them the scores of three.
    Source: Guo et al., "LongT5: Efficient Text-To-Text Transformer for Long Sequences", 2021,
    arXiv 2112.07916.
    """

    name = "longt5"
    form = "T5 buckets in a window"
    modules: ClassVar[tuple[str, ...]] = (f"{STOCK}.LongT5LocalAttention",)
    least = 0  # the stock code computes whole blocks, however few tokens there are
    forward: ClassVar[Any] = local_forward
    travels: ClassVar[type[Blocks]] = Blocks

    def refuse(self, place: Place) -> str:
        module: Any = place.module
        kind = module.q.weight.dtype
        if kind not in _DTYPES:
            return f"weights in {kind}: fused are those in float32 and bfloat16."
        for name in ("relative_attention_bias", "global_relative_attention_bias"):
            table = getattr(module, name, None)
            if table is not None and (
                type(table) is not nn.Embedding or table.max_norm is not None
            ):
                return f"its {name} is a {type(table).__name__} in place of a plain nn.Embedding."
        return ""

    def prepare(self, place: Place, door: Door) -> None:
        door.method(place.module, "forward", type(self).__dict__["forward"])

    def blocks(
        self, module: Any, hidden: Tensor, mask: Any, position_bias: Any, maps: bool
    ) -> Blocks | None:
        """What all layers share, made by the first; None: the stock code computes this call."""
        batch, length = hidden.shape[:2]
        needs = torch.is_grad_enabled() and hidden.requires_grad
        size = Size(batch, module.n_heads, length, length, needs, hidden.dtype, hidden.device)
        if maps or not isinstance(mask, Tensor) or hidden.dtype not in _DTYPES:
            return None
        if not batch or not length or not self.takes(size):
            return None
        if position_bias is not None:
            return position_bias if isinstance(position_bias, self.travels) else None
        keep = self.keep(module, mask, length)
        return None if keep is None else self.travels(module, mask, keep)

    def keep(self, module: Any, mask: Tensor, length: int) -> Tensor | None:
        """The real tokens: those that see themselves."""
        block = module.block_len
        if mask.shape[1:] != (1, -(-length // block), block, 3 * block):
            return None
        own = mask[:, 0].diagonal(block, -2, -1)
        return own.flatten(1)[:, :length].bool()

    def mask(self, module: Any, batch: int, length: int) -> Tensor:
        """As the stack makes it."""
        real = torch.ones(batch, length, device=module.q.weight.device)
        made: Tensor = sys.modules[STOCK]._get_local_attention_mask(
            real, module.block_len, real.device
        )
        return made

    def example(
        self, place: Place, batch: int, length: int, generator: torch.Generator
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        module: Any = place.module
        hidden = torch.randn(batch, length, module.d_model, generator=generator)
        mask = self.mask(module, batch, length)
        given: dict[str, Any] = {"mask": mask}
        first = next(
            (
                one
                for one in place.owner.modules()
                if type(one) is type(module) and getattr(one, "has_relative_attention_bias", False)
            ),
            module,
        )
        if first is not module:
            keep = torch.ones(batch, length, dtype=torch.bool, device=mask.device)
            shared = self.travels(first, mask, keep)
            given["position_bias"] = shared if MARK in vars(module) else shared.tensor()
        return (hidden.to(module.q.weight),), given


class LongT5Global(LongT5):
    r"""The transient-global attention of LongT5's encoder.

    .. math:: \mathrm{softmax}(q_i \cdot k_j + W[\mathrm{bucket}(j - i), h] \;\text{for}\;
              |j - i| \le r, \quad q_i \cdot g_b + G[\mathrm{bucket}(b - b(i)), h])

    The sums :math:`g_b` of blocks of tokens are keys of every query. The two sets of keys are
    computed apart and merged exactly; the stock code holds their scores, and a matrix of ones that
    adds up the tokens, at once.
    """

    name = "longt5 global"
    form = "T5 buckets in a window, and to summed blocks"
    modules: ClassVar[tuple[str, ...]] = (f"{STOCK}.LongT5TransientGlobalAttention",)
    forward: ClassVar[Any] = global_forward
    travels: ClassVar[type[Blocks]] = GlobalBlocks

    def keep(self, module: Any, mask: Tensor, length: int) -> Tensor | None:
        if mask.ndim != 2 or mask.shape[1] != length:
            return None
        real = mask == 1
        return real if bool((real | (mask == 0)).all()) else None

    def mask(self, module: Any, batch: int, length: int) -> Tensor:
        return torch.ones(batch, length, device=module.q.weight.device)


class LongT5Decoder(T5):
    """The attention of LongT5's decoder, which is T5's."""

    name = "longt5 decoder"
    modules: ClassVar[tuple[str, ...]] = (f"{STOCK}.LongT5Attention",)

    def refuse(self, place: Place) -> str:
        if getattr(place.module, "config", None) is None:
            return "this version of transformers gives it no attention function to choose."
        return super().refuse(place)
