"""gpt-oss and its kin: one learned logit per head that takes part in the softmax, a sink."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnbias.bias import Bias, add
from attnbias.fuse import modes
from attnbias.fuse.alibi import KeyFamily, direct, is_small, note, shared, small_entries
from attnbias.fuse.door import Door
from attnbias.fuse.family import Place, compute
from attnbias.hub.masks import asks_causal, mask_terms
from attnbias.hub.registry import CONFIG_KEY
from attnbias.hub.request import MaskRequest

_MODELS = "transformers.models"
# What makes scores more than scale * q.k, or the keys fewer.
_OPAQUE = ("softcap", "indices", "block_indices", "position_bias", "cache")


class Sinks(KeyFamily):
    r"""Attention with a sink logit per head.

    .. math:: o_i = \frac{\sum_j e^{s_{ij}} v_j}{\sum_j e^{s_{ij}} + e^{z_h}}

    The sink is a parameter of the module and reaches the attention function as `s_aux`; windows,
    causal masks and padding are the request's. The stock modules run eager attention: the sdpa
    function of transformers would drop the sink. Source: OpenAI, "gpt-oss-120b & gpt-oss-20b Model
    Card", 2025, arXiv 2508.10925.
    """

    name = "gpt_oss"
    form = "a sink logit per head"
    modules: ClassVar[tuple[str, ...]] = (
        f"{_MODELS}.gpt_oss.modeling_gpt_oss.GptOssAttention",
        f"{_MODELS}.openai_privacy_filter.modeling_openai_privacy_filter.OpenAIPrivacyFilterAttention",
        f"{_MODELS}.flint.modeling_flint.FlintAttention",
        f"{_MODELS}.mimo_v2_flash.modeling_mimo_v2_flash.MiMoV2FlashAttention",
        f"{_MODELS}.granite_swa.modeling_granite_swa.GraniteSWAAttention",
        f"{_MODELS}.granitemoe_swa.modeling_granitemoe_swa.GraniteMoeSWAAttention",
    )

    def refuse(self, place: Place) -> str:
        if (vars(place.config).get(CONFIG_KEY) or "eager") != "eager":
            return (
                "only eager attention has its sinks; write model.set_attn_implementation('eager') "
                "first."
            )
        return ""

    def prepare(self, place: Place, door: Door) -> None:
        """Nothing of its own: it calls the attention interface."""

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
        is_causal: Any = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | None:
        if any(kwargs.get(name) is not None for name in _OPAQUE):
            return None
        if modes.route() == "stock" or not query.is_cpu:
            return None
        who = type(module).__name__

        def whole() -> Bias | None:
            causal = asks_causal(module, is_causal, original)
            terms = mask_terms(mask, query, key.shape[2], original, causal, who)
            return add(*terms) if terms else None

        request = mask if isinstance(mask, MaskRequest) else None
        if request is None or not is_small(query, key):
            bias = whole() if request is None else shared(request, "bias", None, whole)
            return compute(query, key, value, bias, scale=scaling, sink=s_aux, dropout=dropout)
        entries = shared(request, "entries", None, lambda: small_entries(request, original, None))
        if modes.record() is not None:
            note(shared(request, "bias", None, whole))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = direct(query, key, value, entries, scale=scale, sink=s_aux, dropout=dropout)
        return out.contiguous()

    def example(
        self, place: Place, batch: int, length: int, generator: torch.Generator
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        module: Any = place.module
        weight = module.q_proj.weight
        hidden = torch.randn(batch, length, weight.shape[1], generator=generator).to(weight)
        places = _rotary(place, hidden)
        mask = _mask(module, place.config, hidden)
        return (hidden,), {"position_embeddings": places, "attention_mask": mask}


def _rotary(place: Place, hidden: Tensor) -> Any:
    """The rotary positions of the model that the module belongs to; None where it has none."""
    rotary = getattr(place.owner, "rotary_emb", None)
    if rotary is None:
        return None
    positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
    more: Any = ()
    if "layer_type" in inspect.signature(type(rotary).forward).parameters:
        more = (getattr(place.module, "layer_type", None),)
    return rotary(hidden, positions, *more)


def _mask(module: Any, config: Any, hidden: Tensor) -> Any:
    """What the model's code makes of a mask for a layer of this kind."""
    from transformers import masking_utils

    kind = "causal" if module.is_causal else "bidirectional"
    sliding = getattr(module, "sliding_window", None) is not None
    name = {
        ("causal", False): "create_causal_mask",
        ("causal", True): "create_sliding_window_causal_mask",
        ("bidirectional", False): "create_bidirectional_mask",
        ("bidirectional", True): "create_bidirectional_sliding_window_mask",
    }[kind, sliding]
    create = getattr(masking_utils, name)
    known = inspect.signature(create).parameters
    given: dict[str, Any] = {"config": config, "attention_mask": None}
    given["inputs_embeds" if "inputs_embeds" in known else "input_embeds"] = hidden
    if "past_key_values" in known:
        given["past_key_values"] = None
    if "cache_position" in known and known["cache_position"].default is inspect.Parameter.empty:
        given["cache_position"] = torch.arange(hidden.shape[1], device=hidden.device)
    return create(**given)
