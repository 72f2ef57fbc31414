"""What each head writes for what it reads, from the weights: value and output matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnbias.errors import Refused
from attnbias.hub.layers import layers
from attnbias.hub.sites import unwrap

_VALUES = ("v_proj", "value")
_OUTS = ("o_proj", "out_proj", "c_proj", "dense")
_BEFORE = ("input_layernorm", "ln_1", "self_attn_layer_norm")
_LAST = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


def copying(model: nn.Module, tower: str) -> Tensor:
    r"""The copying score of every head: how far what it reads raises the logit of the same token.

    .. math:: c_h = \frac{\sum_i \lambda_i}{\sum_i |\lambda_i|}, \qquad
        \lambda = \mathrm{eig}\!\left(W_U W_O^h W_V^h W_E\right)

    from -1 to 1, the real part of the sum. The nonzero eigenvalues are those of a matrix of the
    head's size, so no matrix of the vocabulary's size is decomposed. The gains of the norms before
    attention and before the unembedding are folded in, and a LayerNorm's centring; what a norm
    divides by, biases and whatever lies between (MLPs, norms after attention) are left out.

    Returns:
        ``(layers, heads)`` float64.

    Raises:
        Refused: a model whose matrices are not known by name.
    """
    root: Any = unwrap(model)
    embed, unembed = root.get_input_embeddings(), root.get_output_embeddings()
    if embed is None or unembed is None or not hasattr(unembed, "weight"):
        raise Refused(
            f"{type(root).__name__} has no unembedding, so that the copying of its heads is not "
            "defined; write copying=False."
        )
    with torch.no_grad():
        after = _folded(unembed.weight.double().T, _last_norm(root)).T  # (vocabulary, size)
        square = after.T @ embed.weight.double()[: len(after)]  # (size, size)
        rows = []
        for site, parts in layers(model).items():
            if site.tower != tower:
                continue
            values, outs = head_matrices(parts.core)
            norm = next((getattr(parts.layer, n) for n in _BEFORE if hasattr(parts.layer, n)), None)
            read = _folded(values.double().transpose(1, 2), norm).transpose(1, 2)
            small = torch.einsum("hdo,de,hve->hov", outs.double(), square, read)
            eigen = torch.linalg.eigvals(small)
            rows.append(eigen.sum(-1).real / eigen.abs().sum(-1).clamp_min(1e-300))
    return torch.stack(rows).cpu()


def head_matrices(core: nn.Module) -> tuple[Tensor, Tensor]:
    """``W_V (heads, value size, size)`` and ``W_O (heads, size, value size)`` of one module.

    Value heads that query heads share are repeated.

    Raises:
        Refused: matrices that are not known by name.
    """
    config: Any = getattr(core, "config", None)
    heads = getattr(core, "num_heads", None) or getattr(config, "num_attention_heads", None)
    out = next((getattr(core, n) for n in _OUTS if hasattr(getattr(core, n, None), "weight")), None)
    value = _values(core, heads, out)
    if out is None or value is None or not isinstance(heads, int):
        raise Refused(
            f"{type(core).__name__}: its value and output matrices are not known by name; write "
            "copying=False."
        )
    writes = _matrix(out)  # (size, heads * value size)
    width = writes.shape[1] // heads
    shared = value.reshape(-1, width, value.shape[1])
    return (
        shared.repeat_interleave(heads // len(shared), 0),
        writes.reshape(len(writes), heads, width).movedim(1, 0),
    )


def _values(core: nn.Module, heads: Any, out: Any) -> Tensor | None:
    """``(value heads * value size, size)``."""
    for name in _VALUES:
        if hasattr(getattr(core, name, None), "weight"):
            return _matrix(getattr(core, name))
    if out is None or not isinstance(heads, int):
        return None
    inner = _matrix(out).shape[1]
    if hasattr(core, "c_attn"):  # GPT-2: queries, keys, values one after the other
        return _matrix(core.c_attn)[-inner:]
    if hasattr(core, "qkv_proj"):  # Phi-3: the same, keys and values may be fewer
        fused = _matrix(core.qkv_proj)
        return fused[inner + (len(fused) - inner) // 2 :]
    if hasattr(core, "query_key_value") and type(core).__name__.startswith("GPTNeoX"):
        fused = _matrix(core.query_key_value)  # the three of each head together
        return fused.reshape(heads, 3, inner // heads, -1)[:, 2].flatten(0, 1)
    return None


def _matrix(module: Any) -> Tensor:
    """``(outputs, inputs)``; GPT-2's Conv1D keeps them the other way round."""
    weight: Tensor = module.weight.detach()
    return weight.T if type(module).__name__ == "Conv1D" else weight


def _last_norm(root: Any) -> nn.Module | None:
    base = root.get_decoder() if hasattr(root, "get_decoder") else root
    for owner in (
        base,
        getattr(root, root.base_model_prefix, None),
        getattr(base, "decoder", None),
    ):
        for name in _LAST:
            if isinstance(getattr(owner, name, None), nn.Module):
                found: nn.Module = getattr(owner, name)
                return found
    return None


def _folded(weight: Tensor, norm: Any) -> Tensor:
    """A matrix ``(..., size, columns)`` with the gain (and centring) of the norm that it reads."""
    gain = getattr(norm, "weight", None)
    if gain is None:
        return weight
    gain = gain.detach().double()
    if type(norm).__name__.startswith("Gemma"):
        gain = 1 + gain
    weight = weight * gain[:, None]
    if isinstance(norm, nn.LayerNorm):
        weight = weight - weight.mean(-2, keepdim=True)
    return weight
