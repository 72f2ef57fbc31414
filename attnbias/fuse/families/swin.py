"""Swin and its copies: a table of displacements inside windows, cut anew in every second layer."""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from attnbias.forms.vit import by_distance
from attnbias.fuse.door import MARK, Door
from attnbias.fuse.family import Family, Place, Size
from attnbias.fuse.scan import changed, replaced, shadowed
from attnbias.fuse.windows import Kept, Windows, attend, back, cut, into

KEPT = "_attnbias_windows"


@functools.cache
def _signature(kind: Any) -> inspect.Signature:
    return inspect.signature(kind.forward)


def core(layer: Any) -> Any:
    """The module of a layer that has the projections of queries, keys and values."""
    return getattr(layer.attention, "self", layer.attention)


def path_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def projected(module: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, values ``(windows, heads, tokens, size)``, whatever the projections' names."""
    names = (
        ("query", "key", "value") if hasattr(module, "query") else ("q_proj", "k_proj", "v_proj")
    )
    split = (*hidden.shape[:2], module.num_attention_heads, -1)
    q, k, v = (getattr(module, name)(hidden).view(split).transpose(1, 2) for name in names)
    return q, k, v


def dropout_of(module: Any) -> float:
    """The dropout of weights that a call has now."""
    if not module.training:
        return 0.0
    own = getattr(module, "attention_dropout", None)
    return float(module.dropout.p if own is None else own)


def attention_forward(module: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """In place of the forward of the module with the projections."""
    windows = args[0] if args else kwargs.get("attention_mask")
    if not isinstance(windows, Windows):
        return type(module).forward(module, hidden_states, *args, **kwargs)
    own = getattr(module, "relative_position_bias", module)
    table = own.relative_position_bias_table
    out = attend(
        *projected(module, hidden_states),
        (table,),
        functools.partial(by_distance, table, tuple(own.window_size)),
        windows,
        getattr(module, KEPT),
        dropout=dropout_of(module),
    )
    out = out.flatten(2)
    return (module.o_proj(out), None) if hasattr(module, "o_proj") else (out,)


def layer_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of the forward of a layer: windows are cut and joined by one copy each."""
    kind: Any = type(module)
    family: Swin = getattr(module, MARK).family
    given = _signature(kind).bind(module, *args, **kwargs).arguments
    hidden, (height, width) = given["hidden_states"], given["input_dimensions"]
    if hasattr(module, "set_shift_and_window_size") and not given.get("always_partition"):
        module.set_shift_and_window_size((height, width))
    more = {**given, **given.pop("kwargs", {})}
    asked = any(more.get(name) is not None for name in ("head_mask", "layer_head_mask"))
    asked = asked or bool(more.get("output_attentions"))
    if asked or not family.fits(module, hidden, height, width):
        return kind.forward(module, *args, **kwargs)
    if getattr(module, "gradient_checkpointing", False) and module.training:
        # Here the class's own forward would checkpoint itself.
        rest = functools.partial(family.layer, module)
        return module._gradient_checkpointing_func(rest, hidden, (height, width))
    return family.layer(module, hidden, (height, width))


class Swin(Family):
    r"""The windows of Swin and the models that copied them.

    .. math:: \mathrm{softmax}(q_i \cdot k_j / \sqrt d + W[y_i - y_j, x_i - x_j, h] - 100\, c_{ij})

    where c is 1 for two tokens of a shifted window that were no neighbours before the shift. Scores
    of a window are few; what is saved is the making of a mask for each window and the copies by
    which windows are padded, rolled, cut and joined.

    Source: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
    2021, arXiv 2103.14030. The numbers are those of transformers' classes, the 100 too.
    """

    name = "swin"
    form = "Swin table"
    modules: ClassVar[tuple[str, ...]] = (
        "transformers.models.swin.modeling_swin.SwinLayer",
        "transformers.models.donut.modeling_donut_swin.DonutSwinLayer",
        "transformers.models.maskformer.modeling_maskformer_swin.MaskFormerSwinLayer",
        "transformers.models.clap.modeling_clap.ClapAudioLayer",
    )
    parts: ClassVar[tuple[str, ...]] = (
        "transformers.models.swin.modeling_swin.SwinAttention",
        "transformers.models.swin.modeling_swin.SwinSelfAttention",
        "transformers.models.donut.modeling_donut_swin.DonutSwinSelfAttention",
        "transformers.models.maskformer.modeling_maskformer_swin.MaskFormerSwinSelfAttention",
        "transformers.models.clap.modeling_clap.ClapAudioSelfAttention",
    )

    # What the module with the projections does in place of its forward.
    attention_forward: ClassVar[Any] = staticmethod(attention_forward)

    def refuse(self, place: Place) -> str:
        inner = core(place.module)
        for module in (inner, cast(nn.Module, place.module.attention)):
            known = [one for one in type(module).__mro__ if path_of(one) in self.parts]
            if module is inner and not known:
                return f"its attention is {type(module).__name__}, which is not known."
            names = shadowed(module)
            if known:
                names += changed(type(module), known[0]) + replaced(known[0])
            if names:
                return f"its {type(module).__name__} has {', '.join(names)} of its own."
        return ""

    def kind(self, place: Place) -> object:
        return bool(place.module.shift_size)

    def prepare(self, place: Place, door: Door) -> None:
        module = core(place.module)
        door.set(module, KEPT, Kept())
        door.method(module, "forward", self.attention_forward)
        door.method(place.module, "forward", layer_forward)

    def fits(self, module: Any, hidden: Tensor, height: int, width: int) -> bool:
        """Whether a layer's call takes the fused route."""
        inner, window = core(module), module.window_size
        own = getattr(inner, "relative_position_bias", inner).window_size
        if not isinstance(window, int) or tuple(own) != (window, window):
            return False  # a map smaller than its window has no fitting table: stock code says so
        count = hidden.shape[0] * -(-height // window) * -(-width // window)
        learns = torch.is_grad_enabled() and (
            hidden.requires_grad or any(one.requires_grad for one in inner.parameters())
        )
        heads, tokens = inner.num_attention_heads, window**2
        size = Size(count, heads, tokens, tokens, learns, hidden.dtype, hidden.device)
        return self.takes(size)

    def layer(self, module: Any, hidden: Tensor, dimensions: tuple[int, int]) -> Any:
        """The forward of a layer."""
        shortcut = hidden
        hidden = self.attended(module, module.layernorm_before(hidden), dimensions)
        hidden = shortcut + module.drop_path(hidden)
        inner = module.layernorm_after(hidden)
        if hasattr(module, "mlp"):
            return module.dropout(module.mlp(inner)) + hidden, None
        return (hidden + module.output(module.intermediate(inner)),)

    def attended(self, module: Any, hidden: Tensor, dimensions: tuple[int, int]) -> Tensor:
        """What the attention of a layer adds, ``(images, height * width, C)``."""
        images = hidden.shape[0]
        windows = cut(images, *dimensions, module.window_size, int(module.shift_size))
        out = module.attention(into(hidden, windows), windows)[0]
        if hasattr(module, "mlp"):
            out = module.dropout(out)
        return back(out, windows, images)

    def example(
        self, place: Place, batch: int, length: int, generator: torch.Generator
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        module: Any = place.module
        # Larger than a window on both sides: a layer keeps the size of a smaller map.
        height = max(math.isqrt(length), module.window_size + 1)
        width = max(length // height, module.window_size + 2)
        weight = module.layernorm_before.weight
        hidden = torch.randn(batch, height * width, len(weight), generator=generator).to(weight)
        return (hidden, (height, width)), {}
