"""Falcon with ALiBi: its model folds ALiBi into an N x N mask for each head; here it is kept apart.

The model is told, while it is fused, that it has no ALiBi: then it hands its mask on as it is, and
the attention makes the numbers itself, by the model's own function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnbias.errors import Refused
from attnbias.fuse.alibi import KeyFamily, attend, causal_mask, forces_masks, modelling, shared
from attnbias.fuse.door import MARK, Door, Mark
from attnbias.fuse.family import Place
from attnbias.fuse.interface import stock_mask
from attnbias.hub.request import MaskRequest

_OWNER = "transformers.models.falcon.modeling_falcon.FalconModel"


def forward(
    module: Any,
    hidden_states: Tensor,
    alibi: Any,
    attention_mask: Any,
    position_ids: Any = None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> Any:
    """In place of ``FalconAttention.forward``; calls that it does not take are stock's sums."""
    mark = module._attnbias_fused
    request = attention_mask
    apart = alibi is None and isinstance(request, MaskRequest)
    if alibi is None and not apart:
        raise Refused(
            f"{type(module).__name__}: with ALiBi the attention mask must be (batch, length), as "
            "for the stock model."
        )
    if apart and mark.family.wants(hidden_states, request):
        query, key, value = _projected(module, hidden_states, layer_past)
        weight = shared(request, "alibi", None, lambda: _weight(module, request))
        out = attend(
            query, key, value, request, weight, None, mark.original, scale=module.inv_norm_factor,
            dropout=module.attention_dropout.p if module.training else 0.0,
            who=type(module).__name__,
        )  # fmt: skip
        return module.dense(out.reshape(*hidden_states.shape[:2], -1)), None
    mask = attention_mask
    if apart:
        alibi, mask = shared(request, "folded", None, lambda: _folded(module, request))
    if mark.original == "eager" or output_attentions:
        return type(module).forward(
            module, hidden_states, alibi, mask, position_ids, layer_past, use_cache,
            output_attentions, position_embeddings, **kwargs,
        )  # fmt: skip
    # The stock forward asks the config, which names us now, whether this is its way.
    query, key, value = _projected(module, hidden_states, layer_past)
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=module.attention_dropout.p if module.training else 0.0,
        is_causal=module.is_causal and mask is None and query.shape[2] > 1,
    )
    out = out.transpose(1, 2).reshape(*hidden_states.shape[:2], -1)
    return module.dense(out), None


def _projected(module: Any, hidden: Tensor, past: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value ``(batch, heads, length, dim)``, those of the cache included."""
    parts = module._split_heads(module.query_key_value(hidden))
    query, key, value = (one.transpose(1, 2) for one in parts)
    if past is not None:
        key, value = past.update(key, value, module.layer_idx)
    return query, key, value


def _alibi(module: Any, request: MaskRequest) -> Tensor:
    """``(batch, heads, 1, keys)``: the tensor of the model's own function, before it is scaled."""
    keep = request.padding
    size, keys = (request.batch, request.keys), request.keys
    if keep is None:
        keep = torch.ones(size, dtype=torch.long, device=request.device)
    else:  # a cache of fixed length has keys that no token fills yet
        keep = F.pad(keep.long(), (0, max(0, keys - keep.shape[1])))
    kind = request.arguments.get("dtype") or module.query_key_value.weight.dtype
    made = modelling(module).build_alibi_tensor(keep, module.num_heads, dtype=kind)
    whole: Tensor = made.view(request.batch, module.num_heads, 1, keys)
    return whole


def _scaled(module: Any, alibi: Tensor) -> Tensor:
    """What the model folds into its mask."""
    return alibi / math.sqrt(module.hidden_size // module.num_heads)


def _weight(module: Any, request: MaskRequest) -> Tensor:
    """``(batch, heads, keys)``: what the stock code adds to the scores, all in all."""
    mark: Mark = module._attnbias_fused
    alibi = _alibi(module, request)
    if request.skipped(mark.original):  # without a mask there is nothing to fold into
        return torch.zeros_like(alibi[:, :, 0])
    weight = _scaled(module, alibi)
    if mark.original == "eager":  # which adds it once more by itself
        weight = weight.float() + alibi.float() * module.inv_norm_factor
    return weight[:, :, 0]


def _folded(module: Any, request: MaskRequest) -> tuple[Tensor, Tensor | None]:
    """``(alibi, mask)`` as the stock model hands them to its layers."""
    alibi = _alibi(module, request)
    mask = stock_mask(request, module._attnbias_fused.original, alibi)
    if mask is None:
        return alibi, None
    hidden = ~mask if mask.dtype == torch.bool else mask < -1
    return alibi, torch.masked_fill(_scaled(module, alibi), hidden, torch.finfo(alibi.dtype).min)


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _attentions(owner: nn.Module) -> list[nn.Module]:
    kinds = Falcon.modules
    return [
        one for one in owner.modules() if any(_path(kind) in kinds for kind in type(one).__mro__)
    ]


def _without_alibi(owner: Any) -> Callable[[], Callable[[], None]]:
    """The change that keeps a model from folding, where all of its attention is ours."""

    def change() -> Callable[[], None]:
        for one in _attentions(owner):
            mark = vars(one).get(MARK)
            if not isinstance(mark, Mark) or not isinstance(mark.family, Falcon):
                return _nothing
        before, owner.use_alibi = owner.use_alibi, False

        def back() -> None:
            owner.use_alibi = before

        return back

    return change


def _nothing() -> None:
    pass


class Falcon(KeyFamily):
    r"""The attention of Falcon models with ALiBi (those with rotary positions have no bias).

    .. math:: \mathrm{softmax}((q_i \cdot k_j + m_h\, p_j) / \sqrt{d}), \quad j \le i

    with :math:`p_j` the place of key j among the real tokens, rounded to bfloat16 as the stock
    model rounds it. Its eager code adds ALiBi twice, and so does this for a model that asked for
    eager. Source: Almazrouei et al., "The Falcon Series of Open Language Models", 2023, arXiv
    2311.16867.
    """

    name = "falcon"
    modules: ClassVar[tuple[str, ...]] = (
        "transformers.models.falcon.modeling_falcon.FalconAttention",
    )

    def refuse(self, place: Place) -> str:
        if not getattr(place.config, "alibi", False):
            return "this model has rotary positions and no bias (config.alibi is False)."
        if not forces_masks():
            return "this transformers makes its mask in a way that hides structure; 5.23 does not."
        owner: Any = place.owner
        kinds: dict[str, Any] = {_path(one): one for one in type(owner).__mro__}
        if _OWNER not in kinds or type(owner).forward is not kinds[_OWNER].forward:
            return "it is not part of a FalconModel, whose code folds ALiBi into the mask."
        for one in _attentions(owner):
            replaced = "forward" in vars(one) and "_old_forward" not in vars(one)
            if replaced or type(one) is not type(place.module):
                return "another layer of the model has a forward of its own."
        return ""

    def prepare(self, place: Place, door: Door) -> None:
        door.method(place.module, "forward", forward)
        door.change(_without_alibi(place.owner))

    def example(
        self, place: Place, batch: int, length: int, generator: torch.Generator
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        module: Any = place.module
        hidden = torch.randn(batch, length, module.hidden_size, generator=generator)
        hidden = hidden.to(module.query_key_value.weight)
        mask = causal_mask(place.config, hidden, always=True)
        if isinstance(mask, MaskRequest):
            return (hidden,), {"alibi": None, "attention_mask": mask}
        keep = torch.ones(batch, length, dtype=torch.long, device=hidden.device)
        alibi = modelling(module).build_alibi_tensor(keep, module.num_heads, hidden.dtype)
        alibi = alibi.view(batch, module.num_heads, 1, length)
        if mask is not None:
            gone = ~mask if mask.dtype == torch.bool else mask < -1
            mask = torch.masked_fill(_scaled(module, alibi), gone, torch.finfo(hidden.dtype).min)
        return (hidden,), {"alibi": alibi, "attention_mask": mask}
