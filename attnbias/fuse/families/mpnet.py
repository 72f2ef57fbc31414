"""MPNet: T5's buckets under a scaled softmax, one table for all layers."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from attnbias import forms
from attnbias.bias import add
from attnbias.fuse.door import MARK, Door, Mark
from attnbias.fuse.family import Family, Place, Size, compute
from attnbias.fuse.interface import stock_mask
from attnbias.fuse.position import PositionBias
from attnbias.hub.masks import mask_terms

_STOCK = "transformers.models.mpnet.modeling_mpnet"
BUCKETS, FAR = 32, 128  # fixed in the stock code, whatever the config says


def compute_position_bias(
    encoder: Any, x: Tensor, position_ids: Any = None, num_buckets: int = BUCKETS
) -> Any:
    """In place of ``MPNetEncoder.compute_position_bias``: the same bias as a structure."""
    batch, length = x.shape[:2]
    marks = (vars(layer.attention.attn).get(MARK) for layer in encoder.layer)
    family = next((one.family for one in marks if isinstance(one, Mark) and one.family), None)
    size = Size(batch, encoder.n_heads, length, length, False, x.dtype, x.device)
    given = position_ids is not None or num_buckets != BUCKETS
    if given or not length or family is None or not family.takes(size):
        return type(encoder).compute_position_bias(
            encoder, x, position_ids=position_ids, num_buckets=num_buckets
        )
    weight = encoder.relative_attention_bias.weight
    form = forms.T5(encoder.n_heads, buckets=BUCKETS, max_distance=FAR, table=weight[:BUCKETS])
    return PositionBias(form(length), weight.dtype)


def forward(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Any = None,
    position_bias: Any = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> Any:
    """In place of ``MPNetSelfAttention.forward``."""
    mark: Mark = module._attnbias_fused
    assert mark.family is not None
    batch, length = hidden_states.shape[:2]
    heads, kind = module.num_attention_heads, hidden_states.dtype
    needs = torch.is_grad_enabled() and hidden_states.requires_grad
    size = Size(batch, heads, length, length, needs, kind, hidden_states.device)
    fits = isinstance(position_bias, PositionBias) and position_bias.bias is not None
    if output_attentions or not fits or not length or not mark.family.takes(size):
        attention_mask = stock_mask(attention_mask, mark.original, hidden_states)
        return type(module).forward(
            module, hidden_states, attention_mask, position_bias, output_attentions, **kwargs
        )
    query, key, value = (
        one(hidden_states).view(batch, length, heads, -1).transpose(1, 2)
        for one in (module.q, module.k, module.v)
    )
    terms = mask_terms(attention_mask, query, length, mark.original, False, type(module).__name__)
    dropout = module.dropout.p if module.training else 0.0
    out = compute(query, key, value, add(position_bias.bias, *terms), dropout=dropout)
    return (module.o(out.flatten(2)),)


class MPNet(Family):
    r"""The attention of MPNet.

    .. math:: \mathrm{softmax}(q_i \cdot k_j / \sqrt d + W[\mathrm{bucket}(j - i), h])

    Source: Song et al., "MPNet: Masked and Permuted Pre-training for Language Understanding",
    2020, arXiv 2004.09297.
    """

    name = "mpnet"
    form = "T5 buckets"
    modules: ClassVar[tuple[str, ...]] = (f"{_STOCK}.MPNetSelfAttention",)
    least = 256 * 256

    def encoder_of(self, place: Place) -> Any:
        """The encoder that a module is part of; None outside of one."""
        for module in place.owner.modules():
            kinds = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__]
            if f"{_STOCK}.MPNetEncoder" in kinds and any(
                layer.attention.attn is place.module
                for layer in module.layer  # type: ignore[union-attr]
            ):
                return module
        return None

    def refuse(self, place: Place) -> str:
        encoder = self.encoder_of(place)
        if encoder is None:
            return "it is not part of an MPNetEncoder, which makes its bias."
        kinds = {f"{one.__module__}.{one.__qualname__}": one for one in type(encoder).__mro__}
        for name in ("forward", "compute_position_bias", "relative_position_bucket"):
            if getattr(type(encoder), name) is not getattr(kinds[f"{_STOCK}.MPNetEncoder"], name):
                return f"its encoder has a method {name} of its own."
        if encoder.relative_attention_bias.weight.shape[0] < BUCKETS:
            return f"its table has fewer rows than the {BUCKETS} buckets of the stock code."
        return ""

    def prepare(self, place: Place, door: Door) -> None:
        door.method(self.encoder_of(place), "compute_position_bias", compute_position_bias)
        door.method(place.module, "forward", forward)

    def example(
        self, place: Place, batch: int, length: int, generator: torch.Generator
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        module: Any = place.module
        weight = module.q.weight
        hidden = torch.randn(batch, length, weight.shape[-1], generator=generator).to(weight)
        return (hidden, None, self.encoder_of(place).compute_position_bias(hidden)), {}
