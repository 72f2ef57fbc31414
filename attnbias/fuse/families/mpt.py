"""MPT: ALiBi as a number per head and key, added by the attention's own code."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from attnbias.fuse.alibi import KeyFamily, attend, causal_mask, modelling, shared
from attnbias.fuse.door import Door
from attnbias.fuse.family import Place
from attnbias.hub.request import MaskRequest


def forward(
    module: Any,
    hidden_states: Tensor,
    position_bias: Any,
    past_key_values: Any = None,
    attention_mask: Any = None,
    **kwargs: Any,
) -> Any:
    """In place of ``MptAttention.forward``; calls that it does not take keep the stock code."""
    mark = module._attnbias_fused
    request = attention_mask
    if not _fits(position_bias, request) or not mark.family.wants(hidden_states, request):
        if isinstance(request, MaskRequest):
            attention_mask = shared(
                request, "hidden", None, lambda: request.stock(mark.original).to(torch.bool)
            )
        return type(module).forward(
            module, hidden_states, position_bias, past_key_values, attention_mask, **kwargs
        )
    batch, length = hidden_states.shape[:2]
    mixed = module.Wqkv(hidden_states)
    if module.clip_qkv:
        mixed = mixed.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    query, key, value = (
        one.view(batch, length, module.n_heads, module.head_dim).transpose(1, 2)
        for one in mixed.chunk(3, dim=2)
    )
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, module.layer_idx)
    weight = position_bias[None, :, 0, position_bias.shape[2] - request.keys :]
    out = attend(
        query, key, value, request, weight, position_bias, mark.original,
        scale=module.softmax_scale, dropout=module.attn_dropout_p if module.training else 0.0,
        who=type(module).__name__,
    )  # fmt: skip
    return module.out_proj(out.reshape(batch, length, -1)), None


def _fits(position_bias: Any, request: Any) -> bool:
    """Whether the bias is one row of numbers for each head, long enough for the keys."""
    return (
        isinstance(request, MaskRequest)
        and isinstance(position_bias, Tensor)
        and position_bias.ndim == 3
        and position_bias.shape[1] == 1
        and position_bias.shape[2] >= request.keys
    )


class Mpt(KeyFamily):
    r"""The attention of MPT.

    .. math:: \mathrm{softmax}(s\, q_i \cdot k_j + m_h\, (j - N + 1)), \quad j \le i

    The stock module runs eager attention whatever is asked; its tensor of ALiBi is one row per
    head already, and is read as it comes. Source: MosaicML, "Introducing MPT-7B", 2023.
    """

    name = "mpt"
    modules: ClassVar[tuple[str, ...]] = ("transformers.models.mpt.modeling_mpt.MptAttention",)

    def prepare(self, place: Place, door: Door) -> None:
        door.method(place.module, "forward", forward)

    def example(
        self, place: Place, batch: int, length: int, generator: torch.Generator
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        module: Any = place.module
        length = min(length, module.max_seq_length)
        hidden = torch.randn(batch, length, module.hidden_size, generator=generator)
        hidden = hidden.to(module.Wqkv.weight)
        alibi = modelling(module).build_mpt_alibi_tensor(
            module.n_heads, module.max_seq_length, device=hidden.device
        )
        mask = causal_mask(place.config, hidden).to(torch.bool)
        return (hidden,), {"position_bias": alibi, "attention_mask": mask}
