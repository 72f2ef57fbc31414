"""LayoutLMv3 and LayoutLMv2: buckets of the distance in the text, and of the two on the page."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnbias.bias import Bias, Dense, GridRelative, Padding, Relative, add
from attnbias.forms.t5 import t5_buckets
from attnbias.fuse.door import MARK, Door, Mark
from attnbias.fuse.family import Family, Place, Size, compute
from attnbias.fuse.interface import stock_mask
from attnbias.fuse.position import PositionBias
from attnbias.hub.masks import mask_terms

# Entries of a bias up to which it is built once for all layers: 128 MB, whatever the length. A page
# of 512 words and 197 patches in 12 heads has 24 MB, of which the stock code holds several.
KEPT = 2**25

_V3 = "transformers.models.layoutlmv3.modeling_layoutlmv3"
_V2 = "transformers.models.layoutlmv2.modeling_layoutlmv2"


class _Layers(PositionBias):
    """A bias with what the first layer of a forward has made of it, for those after it."""

    def __init__(self, bias: Bias, dtype: torch.dtype) -> None:
        super().__init__(bias, dtype)
        self.mask: Any = None
        self.whole: Bias | None = None


def _distances(weight: Tensor, places: Tensor, bins: int, far: int) -> GridRelative:
    """A learned number per head and bucket; `weight (heads, bins)`, `places (batch, length)`.

    The stock code gives these weights no gradient.
    """
    if bool((places == places[:1]).all()):
        places = places[:1]
    distance = torch.arange(-far, far + 1, device=weight.device)
    index = t5_buckets(distance, buckets=bins, max_distance=far)
    table = weight.detach()[:, index]
    return GridRelative(table, places[..., None], center=far, outside="clamp")


def text_bias(encoder: Any, position_ids: Tensor) -> Any:
    """In place of the encoder's method that makes the bias of the text."""
    family = _family(encoder)
    if family is None or not family.structured(encoder, position_ids):
        return getattr(type(encoder), type(family or LayoutLMv3()).text)(encoder, position_ids)
    weight = encoder.rel_pos_bias.weight
    bias = _distances(weight, position_ids, encoder.rel_pos_bins, encoder.max_rel_pos)
    return _Layers(bias, weight.dtype)


def page_bias(encoder: Any, bbox: Tensor) -> Any:
    """In place of the encoder's method that makes the bias of the page: left and bottom edges."""
    family = _family(encoder)
    if family is None or not family.structured(encoder, bbox[..., 0]):
        return getattr(type(encoder), type(family or LayoutLMv3()).page)(encoder, bbox)
    bins, far = encoder.rel_2d_pos_bins, encoder.max_rel_2d_pos
    across, down = encoder.rel_pos_x_bias.weight, encoder.rel_pos_y_bias.weight
    bias = add(
        _distances(across, bbox[..., 0], bins, far), _distances(down, bbox[..., 3], bins, far)
    )
    return _Layers(bias, across.dtype)


def _family(encoder: Any) -> LayoutLMv3 | None:
    for layer in encoder.layer:
        mark = vars(layer.attention.self).get(MARK)
        if isinstance(mark, Mark) and isinstance(mark.family, LayoutLMv3):
            return mark.family
    return None


def forward(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Any = None,
    *more: Any,
    rel_pos: Any = None,
    rel_2d_pos: Any = None,
    **kwargs: Any,
) -> Any:
    """In place of the forward of the self-attention; `more` is what older versions take besides."""
    mark: Mark = module._attnbias_fused
    family = mark.family
    assert isinstance(family, LayoutLMv3)
    batch, length = hidden_states.shape[:2]
    heads = module.num_attention_heads
    given = [one for one in (rel_pos, rel_2d_pos) if one is not None]
    needs = torch.is_grad_enabled() and hidden_states.requires_grad
    kind = hidden_states.dtype
    size = Size(batch, heads, length, length, needs, kind, hidden_states.device)
    plain = not any(one is not None and one is not False for one in more)
    structured = (
        plain and min(batch, length) > 0 and all(isinstance(one, PositionBias) for one in given)
    )
    if not (structured and family.takes(size)):
        attention_mask = stock_mask(attention_mask, mark.original, hidden_states)
        named = {"rel_pos": rel_pos, "rel_2d_pos": rel_2d_pos}
        kwargs.update({name: one for name, one in named.items() if one is not None})
        return type(module).forward(module, hidden_states, attention_mask, *more, **kwargs)
    query, key, value = (
        one.view(batch, length, heads, -1).transpose(1, 2)
        for one in family.projected(module, hidden_states)
    )
    bias = family.bias(module, query, attention_mask, rel_pos, rel_2d_pos)
    dropout = module.dropout.p if module.training else 0.0
    out = compute(query, key, value, bias, dropout=dropout)
    return out.flatten(2), None


class LayoutLMv3(Family):
    r"""The attention of LayoutLMv3.

    .. math:: \mathrm{softmax}((q_i \cdot k_j + W^t_h[\beta(p_j - p_i)] + W^x_h[\beta'(x_j - x_i)]
              + W^y_h[\beta'(y_j - y_i)]) / \sqrt d)

    with the position p in the text, the left edge x and the bottom edge y of a token's box. The
    stock encoder makes two tensors of all pairs for all its layers; in place of them travel the
    tables, positions and boxes. The three weights have no gradient, as in the stock code.
    """

    name = "layoutlmv3"
    form = "buckets of text and page"
    modules: ClassVar[tuple[str, ...]] = (f"{_V3}.LayoutLMv3SelfAttention",)
    encoder: ClassVar[str] = f"{_V3}.LayoutLMv3Encoder"
    text: ClassVar[str] = "_cal_1d_pos_emb"
    page: ClassVar[str] = "_cal_2d_pos_emb"
    least = 160 * 160

    def encoder_of(self, place: Place) -> Any:
        """The encoder that a module is part of; None outside of one."""
        for module in place.owner.modules():
            kinds = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__]
            if self.encoder in kinds and any(
                layer.attention.self is place.module
                for layer in module.layer  # type: ignore[union-attr]
            ):
                return module
        return None

    def refuse(self, place: Place) -> str:
        encoder = self.encoder_of(place)
        if encoder is None:
            return f"it is not part of a {self.encoder.rpartition('.')[2]}, which makes its bias."
        kinds = {f"{one.__module__}.{one.__qualname__}": one for one in type(encoder).__mro__}
        for name in ("forward", self.text, self.page):
            if getattr(type(encoder), name) is not getattr(kinds[self.encoder], name):
                return f"its encoder has a method {name} of its own."
        return ""

    def prepare(self, place: Place, door: Door) -> None:
        encoder = self.encoder_of(place)
        door.method(encoder, self.text, text_bias)
        door.method(encoder, self.page, page_bias)
        door.method(place.module, "forward", forward)

    def structured(self, encoder: Any, places: Tensor) -> bool:
        """Whether the bias of so many tokens is made as a structure."""
        batch, length = places.shape
        heads = encoder.config.num_attention_heads
        kind = next(encoder.parameters()).dtype
        return min(batch, length) > 0 and self.takes(
            Size(batch, heads, length, length, False, kind, places.device)
        )

    def bias(self, module: Any, query: Tensor, mask: Any, text: Any, page: Any) -> Bias | None:
        """All that is added to the scores; made by the first layer, built while it is small."""
        mark: Mark = module._attnbias_fused
        shared = text if page is None else page
        if isinstance(shared, _Layers) and shared.whole is not None and shared.mask is mask:
            return shared.whole
        terms = self.terms(module, text, page)
        terms += self.hidden(mask, query, query.shape[2], mark.original, type(module).__name__)
        if not terms:
            return None
        whole = add(*terms)
        size = (whole.batch, whole.heads, query.shape[2], query.shape[2])
        if math.prod(size) <= KEPT and not isinstance(whole, (Relative, Padding)):
            kind = torch.float64 if query.dtype == torch.float64 else torch.float32
            built = torch.zeros(size, dtype=kind, device=query.device)
            whole.add_to(built)
            whole = Dense(built)
        if isinstance(shared, _Layers):
            shared.mask, shared.whole = mask, whole
        return whole

    def projected(self, module: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``(batch, length, features)``."""
        return module.query(hidden), module.key(hidden), module.value(hidden)

    def terms(self, module: Any, text: Any, page: Any) -> list[Bias]:
        """What is added to the scores."""
        found: list[Bias] = []
        if module.has_relative_attention_bias:  # the stock code reads the page only beside the text
            found.append(text.bias)
            found += [page.bias] if module.has_spatial_attention_bias else []
        return [one * (1 / math.sqrt(module.attention_head_size)) for one in found]

    def hidden(self, mask: Any, query: Tensor, keys: int, original: str, who: str) -> list[Bias]:
        """What hides padding."""
        return mask_terms(mask, query, keys, original, False, who)

    def example(
        self, place: Place, batch: int, length: int, generator: torch.Generator
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        module: Any = place.module
        encoder = self.encoder_of(place)
        weight = next(module.parameters())
        hidden = torch.randn(batch, length, weight.shape[-1], generator=generator).to(weight)
        boxes = torch.randint(0, 1000, (batch, length, 4), generator=generator)
        positions = torch.arange(length).expand(batch, -1)
        given: dict[str, Any] = {}
        if encoder.has_relative_attention_bias:
            given["rel_pos"] = getattr(encoder, self.text)(positions.to(weight.device))
        if encoder.has_spatial_attention_bias:
            given["rel_2d_pos"] = getattr(encoder, self.page)(boxes.to(weight.device))
        return (hidden, self.blank(batch, length, weight)), given

    def blank(self, batch: int, length: int, weight: Tensor) -> Tensor | None:
        """A mask that hides nothing."""
        return None


class LayoutLMv2(LayoutLMv3):
    r"""The attention of LayoutLMv2, whose bias is not divided by :math:`\sqrt d`."""

    name = "layoutlmv2"
    modules: ClassVar[tuple[str, ...]] = (f"{_V2}.LayoutLMv2SelfAttention",)
    encoder: ClassVar[str] = f"{_V2}.LayoutLMv2Encoder"
    text: ClassVar[str] = "_calculate_1d_position_embeddings"
    page: ClassVar[str] = "_calculate_2d_position_embeddings"

    def projected(self, module: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = module.compute_qkv(hidden)
        return query, key, value

    def terms(self, module: Any, text: Any, page: Any) -> list[Bias]:
        found: list[Bias] = [text.bias] if module.has_relative_attention_bias else []
        return found + ([page.bias] if module.has_spatial_attention_bias else [])

    def hidden(self, mask: Any, query: Tensor, keys: int, original: str, who: str) -> list[Bias]:
        keep = ~mask.to(torch.bool)
        if keep.shape[1:3] == (1, 1):
            return [] if bool(keep.all()) else [Padding(keep[:, 0, 0])]
        return [Dense(keep)]

    def blank(self, batch: int, length: int, weight: Tensor) -> Tensor | None:
        return weight.new_zeros(batch, 1, 1, length)
