"""VTI: hidden states are turned towards fitted directions in every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from attnbias.errors import AttnbiasError, Refused
from attnbias.steer.directions import Direction, Table, finite, of, principal
from attnbias.steer.hidden import HiddenCall
from attnbias.steer.rule import Heads, Rule, is_number
from attnbias.steer.scoring import bar
from attnbias.steer.states import collect, tower_of

STEP = 0.1  # the code's fixed factor beside its strength


@dataclass(frozen=True)
class VTIFit:
    """How directions were found, for the record: see `VTI.fit`."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012 - read by pydantic

    pairs: int
    rank: int
    tokens: Literal["last", "each", "mean"]
    pca: Literal["layer", "joint"]
    align: bool


@dataclass(frozen=True, kw_only=True)
class VTI(Rule):
    r"""Turn what every MLP adds towards a direction, without changing its length.

    .. math:: x' = \lVert x \rVert\; \nu\bigl(\nu(x) + 0.1\,\lambda\,\nu(d_l)\bigr),
              \qquad \nu(x) = x / \lVert x \rVert

    with x the output of layer l's MLP at each token and d_l the layer's direction. ``form="add"``
    is the plain addition that the paper writes, on the residual stream after the layer:

    .. math:: h' = h + \lambda\, d_l

    Args:
        directions: `Direction` records, or ``{layer: vector}``; None until `fit` has found them.
        strength: lambda; 0 changes nothing. Published: 0.9 in the code's own command, 0.8 (text)
            as its default; per the appendix, as retold by others, 0.9, and 0.2 to 0.4 for CHAIR.
        form: ``"turn"`` as in the code, ``"add"`` as in the paper.
        towers: the tower that was fitted, where the model has several. layers: those to edit of
            the fitted ones. heads: no part of this rule.
        fitted: the record of the fit, filled in by `fit`.

    Cost: O(tokens x size) per layer. A direction per token makes a recipe of tokens x size numbers
    per layer.

    Raises:
        Refused: no directions yet; a layer whose MLP is not known.
        AttnbiasError: directions of another width or number of tokens than the model's.

    Source: Reducing Hallucinations in Vision-Language Models via Latent Space Steering, 2024
    (arXiv 2410.15778); authors' code read. Code and paper differ in place and geometry, see `form`.
    """

    heads: Heads = "all"
    directions: tuple[Direction, ...] | None = None
    strength: float = 0.9
    form: Literal["turn", "add"] = "turn"
    fitted: VTIFit | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads != "all":
            raise AttnbiasError("VTI edits hidden states: heads stays 'all'.")
        finite(self.strength, "strength")
        if self.form not in ("turn", "add"):
            raise AttnbiasError(f"form must be 'turn' or 'add', got {self.form!r}.")
        if self.directions is not None:
            object.__setattr__(self, "directions", of(self.directions, "directions"))
        object.__setattr__(self, "_table", Table(self.directions or (), "VTI"))

    @property
    def places(self) -> tuple[str, ...]:
        return ("mlp",) if self.form == "turn" else ("layer",)

    def ready(self) -> None:
        if self.directions is None:
            raise Refused(
                "VTI has no directions yet: write VTI(directions={layer: vector}), or run "
                "rule = VTI().fit(model, pairs)."
            )

    def named_layers(self) -> set[int]:
        return super().named_layers() | {one.layer for one in self.directions or ()}

    def hidden(self, site: HiddenCall, hidden: Tensor) -> Tensor | None:
        table: Table = getattr(self, "_table")  # noqa: B009 - no field: recipes hold the numbers
        if site.layer not in table or not self.strength:
            return None
        direction = table.at(site.layer, hidden)
        whole = hidden.to(direction.dtype)
        if self.form == "add":
            return whole + self.strength * direction
        turned = normalize(whole, dim=-1) + STEP * self.strength * normalize(direction, dim=-1)
        length = whole.square().sum(-1, keepdim=True).sqrt()
        return normalize(turned, dim=-1) * length

    def fit(
        self,
        model: nn.Module,
        pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
        *,
        tokens: Literal["last", "each", "mean"] = "last",
        rank: int = 1,
        pca: Literal["layer", "joint"] = "layer",
        align: bool = False,
        progress: bool = True,
    ) -> VTI:
        """Find each layer's direction from pairs of inputs; the rule that is returned is ready.

        The difference of hidden states after each layer, wanted minus unwanted, is one row per
        pair; the direction is the rows' mean plus the sum of their first principal components.

        Args:
            model: in eval mode; it is left as it is.
            pairs: (wanted, unwanted) inputs; where they hold several rows these are averaged.
                Textual, as published: the image and question with the correct and with the
                hallucinated answer. Visual: `masked_copies` of an image and the image.
            tokens: ``"last"`` (textual), ``"each"`` (visual: a direction per token) or ``"mean"``.
            rank: components, 1 as published.
            pca: ``"layer"``: per layer (and token); ``"joint"``: over all layers together, as
                published for text.
            align: turn each component to the mean's side. The code's sign comes from the pair that
                lies farthest from the mean, so it may work against the mean.
            progress: show a bar (needs rich; silent without it).

        The code's visual fit mixes layers and tokens before its PCA, so that what it ships is
        little more than the mean; here the PCA is per layer and token, as the paper describes.

        Cost: two forwards per pair.

        Raises:
            AttnbiasError: fewer than two pairs, inputs of unequal lengths with ``"each"``.
        """
        if tokens not in ("last", "each", "mean"):
            raise AttnbiasError(f"tokens must be 'last', 'each' or 'mean', got {tokens!r}.")
        if pca not in ("layer", "joint"):
            raise AttnbiasError(f"pca must be 'layer' or 'joint', got {pca!r}.")
        if not is_number(rank) or not rank:
            raise AttnbiasError(f"rank must be a whole number from 1, got {rank!r}.")
        kept = list(pairs)
        if len(kept) < 2 or not all(_is_pair(pair) for pair in kept):
            raise AttnbiasError(
                "fit needs at least two pairs (wanted, unwanted) of model inputs, got "
                f"{len(kept)} of {type(kept[0]).__name__ if kept else 'nothing'}."
            )
        tower = tower_of(self, model)

        def keep(site: HiddenCall, hidden: Tensor) -> Tensor:
            whole = hidden.double()
            if tokens == "each":
                return whole.mean(0)
            if tokens == "last":
                rows = torch.arange(len(whole), device=whole.device)
                return whole[rows, site.last].mean(0, keepdim=True)
            real = (site.positions >= 0).expand(whole.shape[:2])[..., None]
            return ((whole * real).sum(1) / real.sum(1)).mean(0, keepdim=True)

        rows = []
        with bar(2 * len(kept), progress, "VTI") as tick:
            for pair in kept:
                found = []
                for inputs in pair:
                    states = collect(model, inputs, layers=self.layers, tower=tower, keep=keep)
                    found.append(torch.stack([state.hidden for state in states]))
                    tick()
                rows.append(found[0] - found[1])
        if len({row.shape for row in rows}) > 1:
            raise AttnbiasError("with tokens='each' all inputs must have the same length.")
        layers = [state.site.layer for state in states]
        whole = torch.stack(rows, -2)  # (layers, tokens, pairs, size)
        if pca == "joint":
            shape = whole.shape
            flat = whole.movedim(-2, 0).flatten(1)
            vectors = principal(flat, rank, align).reshape(shape[0], shape[1], shape[3])
        else:
            vectors = principal(whole, rank, align)
        directions = of(dict(zip(layers, vectors, strict=True)), "directions")
        record = VTIFit(len(kept), rank, tokens, pca, align)
        return replace(self, directions=directions, fitted=record)


def masked_copies(
    pixels: Tensor,
    patch: int = 14,
    *,
    share: float = 0.99,
    copies: int = 50,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Copies of one image with most of its patches replaced by the mean colour, for `VTI.fit`.

    Args:
        pixels: ``(channels, height, width)``. patch: edge in pixels (14 as published).
        share: of patches that are replaced, 0.99 as published. copies: 50 as published.

    Returns:
        ``(copies, channels, height, width)``.
    """
    if pixels.ndim != 3:
        raise AttnbiasError(
            f"pixels must be one image (channels, height, width), got shape {tuple(pixels.shape)}."
        )
    rows, columns = pixels.shape[1] // patch, pixels.shape[2] // patch
    count = int(share * rows * columns)
    made = pixels.repeat(copies, 1, 1, 1)
    mean = pixels.mean((1, 2))[:, None, None]
    for copy in made:
        for place in torch.randperm(rows * columns, generator=generator)[:count].tolist():
            top, left = place // columns * patch, place % columns * patch
            copy[:, top : top + patch, left : left + patch] = mean
    return made


def _is_pair(pair: Any) -> bool:
    return (
        isinstance(pair, Sequence)
        and len(pair) == 2
        and all(isinstance(inputs, Mapping) for inputs in pair)
    )
