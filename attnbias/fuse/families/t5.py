"""T5 and the models that share its attention: a learned table of buckets of distance."""

from __future__ import annotations

import functools
import inspect
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from attnbias import forms
from attnbias.bias import Relative
from attnbias.errors import AttnbiasError
from attnbias.forms.lengths import distances
from attnbias.forms.t5 import t5_buckets
from attnbias.fuse import modes, t5_older
from attnbias.fuse.alibi import direct, note
from attnbias.fuse.door import MARK, Door
from attnbias.fuse.family import Family, Place, Size, opaque
from attnbias.fuse.position import PositionBias

_T5 = "transformers.models.{0}.modeling_{0}.{1}Attention"


def strip(module: Any, index: Tensor, queries: int, keys: int, offset: int) -> Relative:
    """The bias of a module with a table; `index` holds the bucket of each distance.

    Read from the module's own parameter: each layer that is given the bias makes it itself, so its
    gradient reaches the table whatever order layers are computed again in.
    """
    # Not `table[index]`: its gradient is summed in another order each time.
    rows = module.relative_attention_bias.weight.index_select(0, index)
    return Relative(rows.T, queries=queries, keys=keys, offset=offset)


def structure(module: Any, queries: int, keys: int, offset: int) -> PositionBias:
    """In place of the tensor that the module's own ``compute_bias`` returns."""
    table = module.relative_attention_bias.weight
    index = t5_buckets(
        distances(queries, keys, offset, table.device),
        buckets=module.relative_attention_num_buckets,
        max_distance=module.relative_attention_max_distance,
        bidirectional=bidirectional(module),
    )
    made = functools.partial(strip, module, index, queries, keys, offset)
    return PositionBias(made, table.dtype)


def bidirectional(module: Any) -> bool:
    """Whether buckets tell keys before the query from those after it."""
    # Pix2Struct has a decoder only, which does not say so.
    return not getattr(module, "is_decoder", True)


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
    return structure(module, query_length, key_length, int(past_seen_tokens))


def no_bias(module: Any, *_: Any, **__: Any) -> PositionBias:
    """In place of the zeros of a module without a table."""
    return PositionBias(None)


def forward(module: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """In place of the forward of a module without a table: no N x N tensor of zeros is made."""
    if len(args) > 2:
        if args[2] is None:
            args = (*args[:2], PositionBias(None), *args[3:])
    elif kwargs.get("position_bias") is None:
        kwargs["position_bias"] = PositionBias(None)
    return type(module).forward(module, hidden_states, *args, **kwargs)


class T5(Family):
    r"""The attention of T5 and its kin.

    .. math:: \mathrm{softmax}(q_i \cdot k_j + W[\mathrm{bucket}(j - i), h])

    Source: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
    Transformer", 2020, arXiv 1910.10683, section 2.1.

    The position bias travels between layers as a structure in place of a tensor; a causal mask and
    padding join it. Cross-attention, which the stock code gives a tensor of zeros, gets none. In
    UMT5 each layer has a table of its own; in Pix2Struct the text decoder alone has one.
    """

    name = "t5"
    form = "T5 buckets"
    modules: ClassVar[tuple[str, ...]] = (
        _T5.format("t5", "T5"),
        _T5.format("mt5", "MT5"),
        _T5.format("umt5", "UMT5"),
        _T5.format("switch_transformers", "SwitchTransformers"),
        _T5.format("pop2piano", "Pop2Piano"),
        _T5.format("pix2struct", "Pix2StructText"),
        _T5.format("udop", "Udop"),
    )
    least = 320 * 320  # of 8 heads
    rows = 32  # with fewer queries (a decoded token) the bias is no matrix anyway

    def structured(self, module: Any, queries: int, keys: int) -> bool:
        """Whether the bias of so many scores is made as a structure."""
        if type(module.relative_attention_bias) is not nn.Embedding:
            return False  # wrapped since the model was fused
        return self.pays(
            module.relative_attention_bias.weight.device, module.n_heads, queries, keys
        )

    def made(self, module: Any, queries: int, keys: int, offset: int) -> PositionBias:
        """The bias of a module with a table."""
        return structure(module, queries, keys, offset)

    def takes(self, size: Size) -> bool:
        return self.pays(size.device, size.heads, size.queries, size.keys)

    def pays(self, device: torch.device, heads: int, queries: int, keys: int) -> bool:
        """Whether the fused route is taken; the bias and the attention must decide alike."""
        wanted = modes.route()
        if wanted is not None:
            return wanted == "fused"
        large = queries * keys * min(heads, 8) >= 8 * self.least
        return device.type == "cpu" and large and queries >= self.rows

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        original: str,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        position_bias: Any = None,
        **kwargs: Any,
    ) -> Tensor | None:
        """As any family; a decoded token directly, in fewer operators than the stock code."""
        if query.shape[2] == 1 and query.is_cpu and not dropout and modes.route() is None:
            entries = _row(mask, position_bias)
            if entries is not False and scaling is not None and not opaque(kwargs):
                note(None)
                return direct(query, key, value, entries, scale=scaling)
        return super().attend(
            module,
            query,
            key,
            value,
            mask,
            original,
            scaling=scaling,
            dropout=dropout,
            position_bias=position_bias,
            **kwargs,
        )

    def refuse(self, place: Place) -> str:
        module: Any = place.module
        udop = any(kind.__name__ == "UdopAttention" for kind in type(module).__mro__)
        if udop and not module.is_decoder:
            return (
                "UDOP's encoder adds a bias of where words stand on the page, which comes as a "
                "tensor from outside of its attention."
            )
        if getattr(module, "pruned_heads", None):
            return "some of its heads were pruned."
        if not getattr(module, "has_relative_attention_bias", False):
            return ""
        table = module.relative_attention_bias
        if type(table) is not nn.Embedding or table.max_norm is not None:
            return f"its table is a {type(table).__name__} in place of a plain nn.Embedding."
        try:
            forms.T5(
                module.n_heads,
                buckets=module.relative_attention_num_buckets,
                max_distance=module.relative_attention_max_distance,
                bidirectional=bidirectional(module),
                table=table.weight,
            )
        except AttnbiasError as error:
            return str(error)
        return ""

    def prepare(self, place: Place, door: Door) -> None:
        module: Any = place.module
        if t5_older.is_older(module):
            door.method(module, "forward", t5_older.forward)
        elif getattr(module, "has_relative_attention_bias", False):
            door.method(module, "compute_bias", compute_bias)
        elif "position_bias" in _takes(module):
            if _holder(place) is None:  # else it is given the bias of the first layer
                door.method(module, "forward", forward)
        else:  # UMT5 asks its own modules alone
            door.set(module, "has_relative_attention_bias", True)
            door.method(module, "compute_bias", no_bias)

    def example(
        self, place: Place, batch: int, length: int, generator: torch.Generator
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        module: Any = place.module
        weight = next(module.parameters())
        size = getattr(module, "d_model", None) or module.hidden_size
        hidden = torch.randn(batch, length, size, generator=generator).to(weight)
        keep = torch.ones(batch, length, dtype=torch.long)
        if batch > 1:
            keep[-1, length - length // 3 :] = 0
        other = None
        if _crosses(place.name):
            other = torch.randn(batch, length, size, generator=generator).to(weight)
        given: dict[str, Any] = {}
        accepted = _takes(module)
        for name in ("mask", "attention_mask"):
            if name in accepted:
                given[name] = _mask(place, hidden, keep, other)
        if "cache_position" in accepted:  # of older versions
            given["cache_position"] = torch.arange(length)
        for name in ("key_value_states", "encoder_hidden_states"):
            if name in accepted and other is not None:
                given[name] = other
        holder = _holder(place)
        if "position_bias" in accepted and holder is not None:
            given["position_bias"] = self._handed(module, holder, length, given.get("mask"))
        return (hidden,), given

    def _handed(self, module: Any, holder: Any, length: int, mask: Any) -> Any:
        """The bias that a layer is handed by the first of its stack, fused as it is itself."""
        if MARK in vars(module) and self.structured(holder, length, length):
            return structure(holder, length, length, 0)
        with torch.no_grad():
            bias = type(holder).compute_bias(holder, length, length)
        summed = t5_older.is_older(module) and isinstance(mask, Tensor)
        return bias + mask if summed else bias


def _row(mask: Any, bias: Any) -> Tensor | Literal[False] | None:
    """What is added to the scores of one query, or None; False where that is not known here."""
    if isinstance(bias, PositionBias):
        bias = bias.stock()
    if any(not isinstance(given, Tensor) and given is not None for given in (mask, bias)):
        return False
    if mask is None or bias is None or mask.dtype != torch.bool:
        if mask is not None and mask.dtype == torch.bool:
            bias = torch.zeros((), device=mask.device)
        else:
            found: Tensor | None = bias if mask is None else mask if bias is None else mask + bias
            return found
    return torch.where(mask, bias, torch.finfo(bias.dtype).min)


def _takes(module: nn.Module) -> Any:
    """Names of the arguments of its class's forward."""
    return inspect.signature(type(module).forward).parameters


def _crosses(name: str) -> bool:
    """Whether a module attends to the encoder's outputs, by its name: it does not know itself."""
    return "EncDecAttention" in name or "encoder_decoder_attention" in name


def _holder(place: Place) -> Any:
    """The module of the same stack whose bias a module is given; None where it is given none."""
    if _crosses(place.name) or hasattr(place.module, "relative_attention_bias"):
        return None
    for other in place.owner.modules():
        if type(other) is type(place.module) and hasattr(other, "relative_attention_bias"):
            return other
    return None


def _mask(place: Place, hidden: Tensor, keep: Tensor, other: Tensor | None) -> Any:
    """The mask that the model would make for the attention of a module; None without a model."""
    from transformers import masking_utils

    if place.config is None:
        return None
    causal = other is None and not bidirectional(place.module)
    make = masking_utils.create_causal_mask if causal else masking_utils.create_bidirectional_mask
    given = {"config": place.config, "inputs_embeds": hidden, "attention_mask": keep}
    given |= {"past_key_values": None} if causal else {"encoder_hidden_states": other}
    accepted = inspect.signature(make).parameters
    if "cache_position" in accepted:  # of older versions
        given["cache_position"] = torch.arange(hidden.shape[1])
    if "inputs_embeds" not in accepted:
        given["input_embeds"] = given.pop("inputs_embeds")
    return make(**given)
