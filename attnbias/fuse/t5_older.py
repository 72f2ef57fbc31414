"""T5's attention as it was before it called transformers' interface: its whole forward, replaced.

The older code adds the mask to the position bias of the first layer and hands on their sum, and it
knows one way to attend, with all scores in memory. Here the mask and the bias stay apart, and both
stay structures.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from attnbias.bias import add
from attnbias.fuse.door import Mark
from attnbias.fuse.family import compute
from attnbias.fuse.interface import stock_mask
from attnbias.fuse.position import PositionBias
from attnbias.hub.masks import mask_terms
from attnbias.hub.request import MaskRequest
from attnbias.hub.sites import calling_function

if TYPE_CHECKING:
    from attnbias.fuse.families.t5 import T5


def is_older(module: nn.Module) -> bool:
    """Whether the forward of a module computes its scores itself."""
    return calling_function(type(module)) is None


class Summed(PositionBias):
    """A bias for layers that expect its sum with the mask, should one of them compute with it.

    Args:
        plain: the bias; of nothing for zeros. mask: gives the mask as the model would have made it.
    """

    def __init__(self, plain: PositionBias, mask: Callable[[], Tensor | None]) -> None:
        super().__init__(plain._given, plain.dtype)
        self.mask = mask

    def tensor(self) -> Tensor:
        whole = torch.zeros(1, 1, 1, 1) if self._given is None else super().tensor()
        mask = self.mask()
        return whole if mask is None else whole + mask

    def stock(self) -> Tensor:
        return self.tensor()


@functools.cache
def _signature(kind: Hashable) -> inspect.Signature:
    return inspect.signature(kind.forward)  # type: ignore[attr-defined]


def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of the forward of a module that calls no interface."""
    mark: Mark = module._attnbias_fused
    family: T5 = mark.family  # type: ignore[assignment]
    given = dict(_signature(cast(Hashable, type(module))).bind(module, *args, **kwargs).arguments)
    given |= given.pop("kwargs", {})
    del given["self"]
    mask_name = "mask" if "mask" in given else "attention_mask"
    mask, bias = given.get(mask_name), given.get("position_bias")
    hidden, caches = given["hidden_states"], given.get("past_key_values")
    source: Any = given.get("key_value_states", given.get("encoder_hidden_states"))
    crossing = source is not None
    past = 0 if crossing else _past(module, caches, given.get("cache_position"))
    queries = hidden.shape[1]
    keys = source.shape[1] if crossing else past + queries
    alone = isinstance(bias, Tensor) or given.get("layer_head_mask") is not None
    alone = alone or bool(given.get("output_attentions"))
    if alone or not family.pays(hidden.device, module.n_heads, queries, keys):
        return _stock(module, given, mask_name, mark.original)
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        mask = mask.to(hidden.dtype)  # this code adds what it is given
    query = _heads(module, "q", hidden)
    key, value = _keys(module, source if crossing else hidden, given, crossing)
    if bias is None:
        plain = PositionBias(None)
        if module.has_relative_attention_bias:
            plain = family.made(module, queries, key.shape[2], past)
        bias = Summed(plain, functools.partial(stock_mask, mask, mark.original, hidden))
    terms = mask_terms(mask, query, key.shape[2], mark.original, False, type(module).__name__)
    if bias.bias is not None:
        terms.append(bias.bias)
    dropout = module.dropout if module.training else 0.0
    out = compute(query, key, value, add(*terms) if terms else None, scale=1.0, dropout=dropout)
    out = _layer(module, "o")(out.reshape(*hidden.shape[:2], -1))
    # UMT5 hands on no bias, and gives its maps in any case.
    return (
        (out, bias)
        if "position_bias" in _signature(cast(Hashable, type(module))).parameters
        else (out, None)
    )


def _stock(module: Any, given: dict[str, Any], mask_name: str, original: str) -> Any:
    """The module's own forward, with the tensors that the model would have made."""
    hidden, bias = given["hidden_states"], given.get("position_bias")
    if isinstance(given.get(mask_name), MaskRequest):
        given[mask_name] = stock_mask(given[mask_name], original, hidden)
    if isinstance(bias, PositionBias):
        given["position_bias"] = bias.stock()
    return type(module).forward(module, **given)


def _layer(module: Any, name: str) -> Any:
    longer = {"q": "query", "k": "key", "v": "value", "o": "output"}
    return getattr(module, name) if hasattr(module, name) else getattr(module, longer[name])


def _heads(module: Any, name: str, states: Tensor) -> Tensor:
    made: Tensor = _layer(module, name)(states)
    return made.view(*states.shape[:2], module.n_heads, -1).transpose(1, 2)


def _past(module: Any, caches: Any, position: Tensor | None) -> int:
    """How many tokens were there before these."""
    if position is not None:
        return int(position[0])
    return 0 if caches is None else int(caches.get_seq_length(module.layer_idx))


def _keys(
    module: Any, states: Tensor, given: dict[str, Any], crossing: bool
) -> tuple[Tensor, Tensor]:
    """Keys and values, through the cache where there is one."""
    caches: Any = given.get("past_key_values")
    index = module.layer_idx
    both = hasattr(caches, "is_updated")  # of an encoder and a decoder
    cache: Any = caches
    if both:
        cache = caches.cross_attention_cache if crossing else caches.self_attention_cache
        if crossing and caches.is_updated.get(index):
            layer = cache.layers[index]
            return layer.keys, layer.values
    key, value = (_heads(module, name, states) for name in ("k", "v"))
    if cache is None:
        return key, value
    position = None if crossing else given.get("cache_position")
    more = () if position is None else ({"cache_position": position},)
    key, value = cache.update(key, value, index, *more)
    if crossing and both:
        caches.is_updated[index] = True
    return key, value
