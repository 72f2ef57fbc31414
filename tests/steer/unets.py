"""Tiny diffusion models with sharpened attention, and a plain processor that shows its map."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

WORDS, SIZE = 7, 12
Edit = Callable[[str, int, Tensor, Tensor], Tensor]  # tower, layer, scores, timestep -> map


def unet(gated: bool = False, seed: int = 0) -> Any:
    """Two resolutions; self- and cross-attention in the first, the middle and the last block."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    model = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=SIZE,
        attention_head_dim=4,
        norm_num_groups=8,
        attention_type="gated" if gated else "default",
    ).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("to_q.weight", "to_k.weight")):
                weight *= 3.0
            if name.endswith("to_out.0.weight"):
                weight *= 4.0
            if name.endswith(("alpha_attn", "alpha_dense")):
                weight.fill_(1.0)
    return model


def inputs(seed: int = 1, rows: int = 2, timestep: int = 500) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(rows, 4, 8, 8, generator=generator),
        "timestep": torch.tensor(timestep),
        "encoder_hidden_states": torch.randn(rows, WORDS, SIZE, generator=generator),
    }


def boxes(seed: int = 2, rows: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    given = {
        "boxes": torch.rand(rows, 3, 4, generator=generator),
        "masks": torch.ones(rows, 3),
        "positive_embeddings": torch.randn(rows, 3, SIZE, generator=generator),
    }
    return {"cross_attention_kwargs": {"gligen": given}}


def order(name: str) -> int:
    return ("down_blocks", "mid_block", "up_blocks").index(name.split(".")[0])


@contextmanager
def dense(model: Any, edit: Edit | None = None, timestep: Any = 500) -> Iterator[dict[Any, Tensor]]:
    """Every attention by an explicit map in float64, rewritten by `edit`; yields the maps."""
    modules = {n: m for n, m in model.named_modules() if type(m).__name__ == "Attention"}
    old = {name: module.processor for name, module in modules.items()}
    counts: dict[str, int] = {}
    maps: dict[Any, Tensor] = {}
    for name in sorted(modules, key=order):
        tower = {"attn1": "self", "attn2": "cross", "attn": "gated"}[name.rsplit(".", 1)[1]]
        layer = counts.get(tower, 0)
        counts[tower] = layer + 1

        def processor(
            attn: Any,
            hidden_states: Tensor,
            encoder_hidden_states: Tensor | None = None,
            attention_mask: Tensor | None = None,
            place: tuple[str, int] = (tower, layer),
        ) -> Tensor:
            context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            query, key, value = (
                part.unflatten(-1, (attn.heads, -1)).transpose(1, 2).double()
                for part in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
            )
            scores = query @ key.mT / query.shape[-1] ** 0.5
            if attention_mask is not None:
                scores = scores + attention_mask[:, None].double()
            found = scores.softmax(-1) if edit is None else edit(*place, scores, timestep)
            maps[place] = found
            out = (found @ value).transpose(1, 2).flatten(2).to(hidden_states.dtype)
            return attn.to_out[0](out)  # type: ignore[no-any-return]

        modules[name].processor = processor
    try:
        yield maps
    finally:
        for name, module in modules.items():
            module.processor = old[name]
