"""Bloom: ALiBi as a number per head and key, added by the attention's own code."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from attnbias.fuse.alibi import KeyFamily, attend, causal_mask, modelling
from attnbias.fuse.door import Door
from attnbias.fuse.family import Place
from attnbias.fuse.interface import stock_mask
from attnbias.hub.request import MaskRequest


def forward(
    module: Any,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Any,
    attention_mask: Any,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    **kwargs: Any,
) -> Any:
    """In place of ``BloomAttention.forward``; calls that it does not take keep the stock code."""
    mark = module._attnbias_fused
    request, batch = attention_mask, hidden_states.shape[0]
    if (
        output_attentions
        or not _fits(alibi, request, batch * module.num_heads)
        or not mark.family.wants(hidden_states, request)
    ):
        return type(module).forward(
            module, hidden_states, residual, alibi,
            stock_mask(request, mark.original, hidden_states), layer_past,
            use_cache=use_cache, output_attentions=output_attentions, **kwargs,
        )  # fmt: skip
    query, key, value = module._reshape(module.query_key_value(hidden_states))
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    weight = alibi.view(batch, module.num_heads, -1)
    if module.beta != 1.0:
        weight = weight * module.beta
    out = attend(
        query, key, value, request, weight, alibi, mark.original,
        scale=module.inv_norm_factor,
        dropout=module.attention_dropout.p if module.training else 0.0,
        who=type(module).__name__,
    )  # fmt: skip
    out = module.dense(out.reshape(batch, out.shape[1], -1))
    return residual + F.dropout(out, module.hidden_dropout, module.training), None


def _fits(alibi: Any, request: Any, rows: int) -> bool:
    """Whether the bias is one row of numbers for each head of the batch."""
    return (
        isinstance(request, MaskRequest)
        and isinstance(alibi, Tensor)
        and tuple(alibi.shape) == (rows, 1, request.keys)
    )


class Bloom(KeyFamily):
    r"""The attention of Bloom.

    .. math:: \mathrm{softmax}(q_i \cdot k_j / \sqrt{d} + m_h\, p_j), \quad j \le i

    with :math:`p_j` the place of key j among the real tokens. The stock module runs eager attention
    whatever is asked; its tensor of ALiBi (in the dtype of the model, rounding included) is one row
    per head already, and is read as it comes. Source: BigScience Workshop, "BLOOM: A
    176B-Parameter Open-Access Multilingual Language Model", 2022, arXiv 2211.05100.
    """

    name = "bloom"
    modules: ClassVar[tuple[str, ...]] = (
        "transformers.models.bloom.modeling_bloom.BloomAttention",
    )

    def refuse(self, place: Place) -> str:
        module: Any = place.module
        if module.pretraining_tp > 1 and module.slow_but_exact:
            return (
                "slow_but_exact sums its output projection in slices; set "
                "config.slow_but_exact=False."
            )
        return ""

    def prepare(self, place: Place, door: Door) -> None:
        door.method(place.module, "forward", forward)

    def example(
        self, place: Place, batch: int, length: int, generator: torch.Generator
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        module: Any = place.module
        hidden = torch.randn(batch, length, module.hidden_size, generator=generator)
        hidden = hidden.to(module.query_key_value.weight)
        alibi = modelling(module).build_alibi_tensor(
            torch.ones(batch, length, dtype=torch.long, device=hidden.device),
            module.num_heads,
            hidden.dtype,
        )
        mask = causal_mask(place.config, hidden)
        return (hidden, torch.zeros_like(hidden)), {"alibi": alibi, "attention_mask": mask}
