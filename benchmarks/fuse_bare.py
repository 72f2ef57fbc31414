"""Real models with their attention bias left out, through PyTorch's fused kernel.

What is compared against: the same weights, the same projections, cache and rest of the model, and
attention by `scaled_dot_product_attention` without the bias term. Masks that belong to the model
(causality, padding, the regions of shifted windows) stay. A model so changed computes something
else, so a benchmark gives it a copy that shares the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnbias.fuse.door import Method
from attnbias.fuse.position import PositionBias
from attnbias.hub.registry import CONFIG_KEY

NAME = "attnbias_benchmark_bare"


class NoMask:
    """For model code that converts its causal mask without looking whether there is one."""

    def to(self, *_: Any, **__: Any) -> None:
        return None


def remove(model: nn.Module) -> int:
    """Leave the bias out of every module whose class is known here; how many there were."""
    changed = 0
    for module in list(model.modules()):
        for kind in type(module).__mro__:
            change = CHANGES.get(kind.__qualname__)
            if change is not None:
                change(module)
                changed += 1
                break
    return changed


def _method(module: Any, name: str, function: Callable[..., Any]) -> None:
    vars(module)[name] = Method(function, module)


# Modules that call the attention interface -------------------------------------------------------


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **more: Any
) -> Any:
    """The stock fused kernel; `position_bias` and sinks are dropped, a mask of one number too."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    for name in ("position_bias", "s_aux"):
        more.pop(name, None)
    if isinstance(mask, Tensor) and mask.numel() == 1:
        mask = None
    return sdpa_attention_forward(module, query, key, value, mask, **more)


def _masks(*given: Any, **more: Any) -> Any:
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*given, **more)


def _bare_interface(module: Any) -> None:
    """Its config names the kernel above."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _masks)
    vars(module.config)[CONFIG_KEY] = NAME


def _no_position_bias(*_: Any, **__: Any) -> PositionBias:
    return PositionBias(None)


def _t5_forward(module: Any, hidden: Tensor, *given: Any, **more: Any) -> Any:
    if len(given) < 3:
        more["position_bias"] = PositionBias(None)
    return type(module).forward(module, hidden, *given, **more)


def _t5(module: Any) -> None:
    _bare_interface(module)
    _method(module, "compute_bias", _no_position_bias)
    _method(module, "forward", _t5_forward)


def _nothing_to_add(module: Any, *_: Any, **__: Any) -> Tensor:
    return torch.zeros(1, 1, 1, 1, dtype=next(module.parameters()).dtype)


def _window_bias(module: Any) -> None:
    _method(module, "forward", _nothing_to_add)


# Decoders with ALiBi: attention of their own -----------------------------------------------------


def _causal(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
    """Causal attention, or one row over all keys of a cache; ``(batch, queries, width)``."""
    out = F.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=query.shape[2] > 1
    )
    return out.transpose(1, 2).reshape(query.shape[0], query.shape[2], -1)


def _mpt_forward(
    module: Any, hidden: Tensor, position_bias: Any, past_key_values: Any = None, **_: Any
) -> Any:
    shape = (*hidden.shape[:2], module.n_heads, module.head_dim)
    parts = module.Wqkv(hidden).chunk(3, dim=2)
    query, key, value = (one.reshape(shape).transpose(1, 2) for one in parts)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, module.layer_idx)
    return module.out_proj(_causal(query, key, value)), None


def _bloom_forward(
    module: Any, hidden: Tensor, residual: Tensor, *_: Any, layer_past: Any = None, **__: Any
) -> Any:
    query, key, value = module._reshape(module.query_key_value(hidden))
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    return module.dense(_causal(query, key, value)) + residual, None


def _falcon_forward(module: Any, hidden: Tensor, *_: Any, layer_past: Any = None, **__: Any) -> Any:
    parts = module._split_heads(module.query_key_value(hidden))
    query, key, value = (one.transpose(1, 2) for one in parts)
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    key, value = (one.expand(-1, query.shape[1], -1, -1) for one in (key, value))
    return module.dense(_causal(query, key, value)), None


def _none(*_: Any, **__: Any) -> None:
    return None


def _no_mask(*_: Any, **__: Any) -> NoMask:
    return NoMask()


def _mpt_model(module: Any) -> None:
    """No table of the longest length, and a mask that its code can convert."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    _bare_interface(module)
    ALL_MASK_ATTENTION_FUNCTIONS.register(f"{NAME}_no_mask", _no_mask)
    vars(module.config)[CONFIG_KEY] = f"{NAME}_no_mask"
    _method(module, "build_mpt_alibi_tensor", _none)


def _falcon_model(module: Any) -> None:
    """Its code asks for a mask in any case, to fold ALiBi into it."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    ALL_MASK_ATTENTION_FUNCTIONS.register(f"{NAME}_none", _none)
    vars(module.config)[CONFIG_KEY] = f"{NAME}_none"


# Others with attention of their own --------------------------------------------------------------


def _swin_v2_forward(
    module: Any, hidden: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any
) -> Any:
    shape = (hidden.shape[0], -1, module.num_attention_heads, module.attention_head_size)
    parts = (module.query(hidden), module.key(hidden), module.value(hidden))
    query, key, value = (one.view(shape).transpose(1, 2) for one in parts)
    scale = torch.clamp(module.logit_scale, max=math.log(100.0)).exp()
    query, key = F.normalize(query, dim=-1) * scale, F.normalize(key, dim=-1)
    if attention_mask is not None:  # the stock code adds it twice
        images = hidden.shape[0] // attention_mask.shape[0]
        attention_mask = (2 * attention_mask).repeat(images, 1, 1)[:, None]
    out = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=1.0)
    return (out.transpose(1, 2).reshape(hidden.shape),)


def _layout_forward(module: Any, hidden: Tensor, *_: Any, **__: Any) -> Any:
    shape = (hidden.shape[0], -1, module.num_attention_heads, module.attention_head_size)
    parts = (module.query(hidden), module.key(hidden), module.value(hidden))
    query, key, value = (one.view(shape).transpose(1, 2) for one in parts)
    out = F.scaled_dot_product_attention(query, key, value)
    return out.transpose(1, 2).reshape(hidden.shape), None


def _layout_encoder(module: Any) -> None:
    _method(module, "_cal_1d_pos_emb", _none)
    _method(module, "_cal_2d_pos_emb", _none)


def _blocks(module: Any, states: Tensor, keys: bool) -> Tensor:
    """``(batch, blocks, heads, block or 3 blocks, dim)`` from a projection."""
    from transformers.models.longt5 import modeling_longt5 as file

    states = states.view(states.shape[0], -1, module.n_heads, module.key_value_proj_dim)
    states = file._split_into_blocks(states, module.block_len, dim=1)
    if keys:
        states = file._concatenate_3_blocks(states, block_dim=1, sequence_dim=2)
    return states.transpose(2, 3)


def _long_t5(
    module: Any, hidden: Tensor, mask: Any, sides: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Any]:
    """Attention within three blocks (and to `sides`), without a bias."""
    query = _blocks(module, module.q(hidden), keys=False)
    key = _blocks(module, module.k(hidden), keys=True)
    value = _blocks(module, module.v(hidden), keys=True)
    mask = mask.transpose(1, 2)  # (batch, blocks, 1, block, 3 blocks)
    if sides is not None:
        mask = F.pad(mask, (0, sides[0].shape[1]), value=True)
        shape = (hidden.shape[0], -1, module.n_heads, module.key_value_proj_dim)
        wide = [one.view(shape).transpose(1, 2)[:, None] for one in sides]
        wide = [one.expand(-1, key.shape[1], -1, -1, -1) for one in wide]
        key, value = torch.cat([key, wide[0]], 3), torch.cat([value, wide[1]], 3)
    flat = [one.flatten(0, 1) for one in (query, key, value, mask)]
    out = F.scaled_dot_product_attention(*flat, scale=1.0)
    out = out.unflatten(0, query.shape[:2]).transpose(2, 3)
    out = out.reshape(hidden.shape[0], -1, module.inner_dim)[:, : hidden.shape[1]]
    return module.o(out), PositionBias(None)


def _local_forward(module: Any, hidden: Tensor, mask: Any = None, *_: Any, **__: Any) -> Any:
    return _long_t5(module, hidden, mask, None)


def _global_forward(module: Any, hidden: Tensor, mask: Any = None, *_: Any, **__: Any) -> Any:
    from transformers.models.longt5 import modeling_longt5 as file

    blocks, segments = file._make_global_fixed_block_ids(mask, module.global_block_size)
    summary = file._create_global_aggregates(hidden, blocks, segments.shape[-1])
    summary = module.global_input_layer_norm(summary)
    local = file._get_local_attention_mask(mask, module.block_len, hidden.device)
    return _long_t5(module, hidden, local, (module.k(summary), module.v(summary)))


def _fold_attention_forward(module: Any, q_x: Tensor, kv_x: Tensor, *_: Any, **__: Any) -> Any:
    query, key, value = module._prep_qkv(q_x, kv_x)
    flat = [one.flatten(0, -4) for one in (query, key, value)]
    out = F.scaled_dot_product_attention(*flat, scale=1.0).view(query.shape)
    return module._wrap_up(out.transpose(-2, -3), q_x)


def _triangle_forward(
    module: Any, x: Tensor, mask: Any = None, chunk_size: int | None = None, **_: Any
) -> Any:
    """No bias is made of the pairs; the fused kernel needs no chunks, and memory stays with it."""
    x = x if module.starting else x.transpose(-2, -3)
    x = module.layer_norm(x)
    x = module.mha(x, x)
    return x if module.starting else x.transpose(-2, -3)


def _fold_sequence_forward(module: Any, x: Tensor, *_: Any, **__: Any) -> Any:
    parts = module.proj(x).view(*x.shape[:2], module.num_heads, -1).transpose(1, 2).chunk(3, -1)
    out = F.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(x.shape)
    if module.gated:
        out = module.g_proj(x).sigmoid() * out
    return module.o_proj(out), None


def _rows_forward(
    module: Any, z: Tensor, mask: Any = None, chunk_size: int | None = None
) -> Tensor:
    z = module.norm(z.transpose(1, 2) if module.ending else z)
    parts = [one(z) for one in (module.query, module.key, module.value)]
    query, key, value = (
        one.unflatten(-1, (module.heads, module.size)).transpose(-2, -3).flatten(0, 1)
        for one in parts
    )
    found = F.scaled_dot_product_attention(query, key, value).transpose(-2, -3).flatten(-2)
    out: Tensor = module.out(found.view(*z.shape[:3], -1) * module.gate(z).sigmoid())
    return out.transpose(1, 2) if module.ending else out


def _pairs_forward(module: Any, s: Tensor, z: Tensor, keep: Any = None) -> Tensor:
    s = module.norm(s)
    query, key, value = (
        one(s).unflatten(-1, (module.heads, module.size)).transpose(1, 2)
        for one in (module.query, module.key, module.value)
    )
    found = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    out: Tensor = module.out(module.gate(s).sigmoid() * found)
    return out


def _forward(function: Callable[..., Any]) -> Callable[[Any], None]:
    return lambda module: _method(module, "forward", function)


CHANGES: dict[str, Callable[[Any], None]] = {
    "T5Attention": _t5,
    "LongT5LocalAttention": _forward(_local_forward),
    "LongT5TransientGlobalAttention": _forward(_global_forward),
    "MptModel": _mpt_model,
    "MptAttention": _forward(_mpt_forward),
    "BloomModel": _bare_interface,
    "BloomAttention": _forward(_bloom_forward),
    "FalconModel": _falcon_model,
    "FalconAttention": _forward(_falcon_forward),
    "GptOssAttention": _bare_interface,
    "SwinAttention": _bare_interface,
    "SwinRelativePositionBias": _window_bias,
    "BeitAttention": _bare_interface,
    "BeitRelativePositionBias": _window_bias,
    "Swinv2SelfAttention": _forward(_swin_v2_forward),
    "LayoutLMv3Encoder": _layout_encoder,
    "LayoutLMv3SelfAttention": _forward(_layout_forward),
    "EsmFoldTriangleAttention": _forward(_triangle_forward),
    "EsmFoldAttention": _forward(_fold_attention_forward),
    "EsmFoldSelfAttention": _forward(_fold_sequence_forward),
    "TriangleAttention": _forward(_rows_forward),
    "AttentionPairBias": _forward(_pairs_forward),
}
