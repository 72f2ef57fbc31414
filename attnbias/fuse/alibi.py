r"""What families of a bias per head and key share: ALiBi under softmax, and one query at a time.

.. math::
    \mathrm{softmax}_j(q_i \cdot k_j + m_h (j - i)) = \mathrm{softmax}_j(q_i \cdot k_j + m_h j)

A number that is the same for all keys of a row changes nothing, so ALiBi (Press, Smith and Lewis,
"Train Short, Test Long", 2022, arXiv 2108.12409) is a number per head and key, O(heads x keys).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnbias.bias import Bias, KeyBias, add
from attnbias.fuse import modes
from attnbias.fuse.family import Family, Size, compute
from attnbias.hub.masks import mask_terms
from attnbias.hub.request import MaskRequest

Made = TypeVar("Made")


class KeyFamily(Family):
    """A family whose modules get a mask request and a number per head and key."""

    form = "ALiBi (a bias per key)"
    least: ClassVar[int] = 64 * 64

    def takes(self, size: Size) -> bool:
        # One query is three small operators in place of stock's ten.
        if size.queries == 1 and modes.route() is None:
            return size.device.type == "cpu"
        return super().takes(size)

    def wants(self, module: nn.Module, hidden: Tensor, request: Any, heads: int) -> bool:
        """Whether a forward of `module` over `hidden` takes the fused route."""
        if not isinstance(request, MaskRequest) or request.batch != hidden.shape[0]:
            return False
        training = torch.is_grad_enabled() and (
            hidden.requires_grad or any(one.requires_grad for one in module.parameters())
        )
        size = Size(
            request.batch, heads, request.queries, request.keys, training, hidden.dtype,
            hidden.device,
        )  # fmt: skip
        return self.takes(size)


def shared(request: MaskRequest, name: str, source: Any, make: Callable[[], Made]) -> Made:
    """What the layers of one forward share: made once for a request and a `source` object."""
    found = request.kept.get(name)
    if found is None or found[0] is not source:
        found = request.kept[name] = (source, make())
    made: Made = found[1]
    return made


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    request: MaskRequest,
    weight: Tensor,
    source: Any,
    original: str,
    *,
    scale: float,
    dropout: float,
    who: str,
) -> Tensor:
    """``(batch, queries, heads, dim)`` under a number per key and the mask of a request.

    Args:
        weight: ``(batch | 1, heads, keys)``. source: the object that is the same for all layers of
            a forward and that `weight` follows from.
        original: the implementation that the config named. who: for messages.
    """

    def whole() -> Bias:
        masks = mask_terms(request, query, key.shape[2], original, False, who)
        return add(KeyBias(weight), *masks)

    bias = shared(request, "bias", source, whole)
    if query.shape[2] > 1:
        return compute(query, key, value, bias, scale=scale, dropout=dropout)
    row = shared(request, "row", source, lambda: one_row(bias))
    return one_query(query, key, value, row, bias, scale=scale, dropout=dropout)


def one_row(bias: Bias) -> Tensor:
    """``(batch | 1, heads | 1, 1, keys)``: a bias of one query, hidden keys at the lowest number.

    A row that hides every key then weighs all alike, as in the stock modules.
    """
    row = bias.dense()
    return row.float().clamp_min(torch.finfo(torch.float32).min)


def one_query(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: Tensor | None,
    bias: Bias | None,
    *,
    scale: float,
    sink: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of a single query, ``(batch, 1, heads, value dim)``: two products and a softmax.

    Args:
        query: ``(batch, heads, 1, dim)``. key, value: ``(batch, key heads, keys, dim)``.
        row: ``(batch | 1, heads | 1, 1, keys)``, added to the scores. bias: the same, for the
            record.
        sink: ``(heads,)``, an extra logit of each head.
    """
    seen = modes.record()
    if seen is not None:
        seen.append(("no bias" if bias is None else repr(bias), "one query"))
    batch, heads, _, size = query.shape
    groups, keys = key.shape[1], key.shape[2]
    # Query heads of one key head are rows of one product.
    rows = query.reshape(batch * groups, heads // groups, size)
    key = key.reshape(batch * groups, keys, size).transpose(1, 2)
    value = value.reshape(batch * groups, keys, value.shape[-1])
    if row is not None:
        row = row.expand(batch, heads, 1, keys).reshape(batch * groups, heads // groups, keys)
    if row is not None and row.dtype == query.dtype:
        scores = torch.baddbmm(row, rows, key, alpha=scale)
    else:
        scores = torch.bmm(rows, key).float() * scale
        scores = scores if row is None else scores + row
    if sink is not None:
        logit = sink.to(scores.dtype).expand(batch, heads).reshape(*scores.shape[:2], 1)
        weights = torch.cat([scores, logit], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    weights = weights.to(value.dtype)
    if dropout:
        weights = F.dropout(weights, dropout)
    return torch.bmm(weights, value).view(batch, 1, heads, value.shape[-1])


def causal_mask(config: Any, hidden: Tensor, *, always: bool = False) -> Any:
    """What the model's code makes of a causal mask over ``hidden (batch, length, .)``.

    always: also where the operator's own causal mask would do.
    """
    from transformers.masking_utils import create_causal_mask

    known = inspect.signature(create_causal_mask).parameters
    given: dict[str, Any] = {"config": config, "attention_mask": None, "past_key_values": None}
    given["inputs_embeds" if "inputs_embeds" in known else "input_embeds"] = hidden
    if "cache_position" in known and known["cache_position"].default is inspect.Parameter.empty:
        given["cache_position"] = torch.arange(hidden.shape[1], device=hidden.device)
    if always and "allow_is_causal_skip" in known:
        given["allow_is_causal_skip"] = False
    return create_causal_mask(**given)


def modelling(module: nn.Module) -> Any:
    """The file of transformers that defines the class of `module` (or the one it derives from)."""
    import sys

    for kind in type(module).__mro__:
        if kind.__module__.startswith("transformers.models."):
            return sys.modules[kind.__module__]
    raise AssertionError(type(module))
