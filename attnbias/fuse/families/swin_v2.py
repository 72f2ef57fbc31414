"""Swin v2 and Swin2SR: scores that are cosines, and a table made by a small network."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnbias.forms.swin_v2 import LARGEST
from attnbias.forms.vit import by_distance
from attnbias.fuse.families.swin import KEPT, Swin, dropout_of, projected
from attnbias.fuse.windows import Windows, attend, back, cut, into


def _table(module: Any) -> Tensor:
    """``(heads, 2 window - 1, 2 window - 1)`` by key minus query."""
    made = module.continuous_position_bias_mlp(module.relative_coords_table)
    table = 16 * torch.sigmoid(made.view(-1, module.num_attention_heads))
    return by_distance(table, tuple(module.window_size))


def _sources(module: Any) -> tuple[Tensor, ...] | None:
    """The tensors that the table is a function of; None where its network is not the usual one."""
    network = module.continuous_position_bias_mlp
    usual = [type(one) for one in network.children()] == [nn.Linear, nn.ReLU, nn.Linear]
    hooked = any(one._forward_hooks or one._forward_pre_hooks for one in network.modules())
    if not usual or hooked:
        return None
    return (*network.parameters(), module.relative_coords_table)


def attention_forward(module: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """In place of the forward of the module with the projections."""
    windows = args[0] if args else kwargs.get("attention_mask")
    if not isinstance(windows, Windows):
        return type(module).forward(module, hidden_states, *args, **kwargs)
    query, key, value = projected(module, hidden_states)
    factor = module.logit_scale.clamp(max=LARGEST).exp()
    query = query * (factor / _length(query)).to(query.dtype)
    key = key * (1 / _length(key))
    table, sources = functools.partial(_table, module), _sources(module)
    if sources is None:
        made = table()
        table, sources = functools.partial(torch.clone, made), (made,)
    out = attend(
        query,
        key,
        value,
        sources,
        table,
        windows,
        getattr(module, KEPT),
        scale=1.0,
        hidden=-200.0,  # the stock code adds its 100 twice
        dropout=dropout_of(module),
    )
    return (out.flatten(2),)


def _length(tensor: Tensor) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(tensor, dim=-1, keepdim=True)
    return found.clamp_min(1e-12)


class SwinV2(Swin):
    r"""The windows of Swin v2.

    .. math:: \mathrm{softmax}(e^{\min(\tau_h, \log 100)} \cos(q_i, k_j)
        + 16\, \sigma(g_h(\hat y_{ij}, \hat x_{ij})) - 200\, c_{ij})

    with the network g of displacements on a logarithmic scale and c as in `Swin`. The table is made
    by g once for each call that learns, else once as long as g stays the same.

    Source: Liu et al., "Swin Transformer V2: Scaling Up Capacity and Resolution", 2022, arXiv
    2111.09883. The numbers are those of transformers' classes, which add the 100 of Swin twice.
    """

    name = "swin v2"
    form = "Swin v2 network"
    modules: ClassVar[tuple[str, ...]] = (
        "transformers.models.swinv2.modeling_swinv2.Swinv2Layer",
        "transformers.models.swin2sr.modeling_swin2sr.Swin2SRLayer",
    )
    attention_forward: ClassVar[Any] = staticmethod(attention_forward)
    parts: ClassVar[tuple[str, ...]] = (
        "transformers.models.swinv2.modeling_swinv2.Swinv2SelfAttention",
        "transformers.models.swin2sr.modeling_swin2sr.Swin2SRSelfAttention",
    )

    def layer(self, module: Any, hidden: Tensor, dimensions: tuple[int, int]) -> Any:
        windows = cut(hidden.shape[0], *dimensions, module.window_size, int(module.shift_size))
        out = back(module.attention(into(hidden, windows), windows)[0], windows, hidden.shape[0])
        hidden = hidden + module.drop_path(module.layernorm_before(out))
        inner = module.output(module.intermediate(hidden))
        return (hidden + module.drop_path(module.layernorm_after(inner)),)
