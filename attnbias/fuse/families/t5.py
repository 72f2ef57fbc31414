"""T5 and the models that share its attention: a learned table of buckets, shared by all layers."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnbias import forms
from attnbias.fuse import modes
from attnbias.fuse.door import Door
from attnbias.fuse.family import Family, Place
from attnbias.fuse.position import PositionBias


def compute_bias(
    module: Any,
    query_length: int,
    key_length: int,
    device: Any = None,
    past_seen_tokens: Any = 0,
) -> Any:
    """In place of ``T5Attention.compute_bias``: the same bias as a structure.

    What the fused route does not take keeps the tensor of the stock code.
    """
    family: T5 = module._attnbias_fused.family
    if not family.structured(module, query_length, key_length):
        return type(module).compute_bias(
            module, query_length, key_length, device=device, past_seen_tokens=past_seen_tokens
        )
    form = forms.T5(
        module.n_heads,
        buckets=module.relative_attention_num_buckets,
        max_distance=module.relative_attention_max_distance,
        bidirectional=not module.is_decoder,
        table=module.relative_attention_bias.weight,
    )
    bias = form(query_length, key_length, offset=int(past_seen_tokens))
    return PositionBias(bias, module.relative_attention_bias.weight.dtype)


def forward(module: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """In place of the forward of a module without a table: no N x N tensor of zeros is made."""
    if len(args) < 3 and kwargs.get("position_bias") is None:
        kwargs["position_bias"] = PositionBias(None)
    return type(module).forward(module, hidden_states, *args, **kwargs)


class T5(Family):
    r"""The attention of T5 and its kin.

    .. math:: \mathrm{softmax}(q_i \cdot k_j + W[\mathrm{bucket}(j - i), h])

    The position bias travels between layers as a structure in place of a tensor; a causal mask and
    padding join it. Cross-attention, which the stock code gives a tensor of zeros, gets none.
    """

    name = "t5"
    form = "T5 buckets"
    modules: ClassVar[tuple[str, ...]] = (
        "transformers.models.t5.modeling_t5.T5Attention",
        "transformers.models.mt5.modeling_mt5.MT5Attention",
    )
    least = 128 * 128

    def structured(self, module: nn.Module, queries: int, keys: int) -> bool:
        """Whether the bias of so many scores is made as a structure."""
        wanted = modes.route()
        if wanted is not None:
            return wanted == "fused"
        device: torch.device = module.relative_attention_bias.weight.device  # type: ignore[union-attr,assignment]
        return device.type == "cpu" and queries * keys >= self.least

    def prepare(self, place: Place, door: Door) -> None:
        if getattr(place.module, "has_relative_attention_bias", False):
            door.method(place.module, "compute_bias", compute_bias)
        else:
            door.method(place.module, "forward", forward)

    def example(
        self, place: Place, batch: int, length: int, generator: torch.Generator
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        module: Any = place.module
        weight = module.q.weight
        hidden = torch.randn(batch, length, module.d_model, generator=generator).to(weight)
        return (hidden,), {}
