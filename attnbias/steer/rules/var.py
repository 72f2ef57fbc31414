"""VAR: take attention from visual and text sinks and give it to the rest of the image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError, Refused
from attnbias.steer.by_position import at_positions, to_positions, together
from attnbias.steer.rule import Rule, is_number
from attnbias.steer.site import SiteCall
from attnbias.steer.spans import Keys, keys_of

OTHER, TEXT_SINK, VISUAL_SINK, VISUAL = range(4)


@dataclass(frozen=True)
class SinkFit:
    """How the sink dimensions were found, for the record.

    Attributes:
        prompts: how many were used.
        scores: for each dimension of the rule, the mean over prompts and layers of the first
            token's normalised activation. others: the same for the median token.
        next_best: the score of the best dimension that was not taken.
    """

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012 - read by pydantic

    prompts: int
    scores: tuple[float, ...]
    others: tuple[float, ...]
    next_best: float


@dataclass(frozen=True, kw_only=True)
class VAR(Rule):
    r"""Redistribute the attention of sinks to the image, in rows and heads that look at it.

    .. math:: S = \Big\{j : \max_{d \in D} \frac{|h_{jd}|}{\mathrm{rms}(h_j)} > \tau\Big\}, \quad
              a'_{ij} = p\, a_{ij}\ (j \in S), \quad
              a'_{ij} = a_{ij} \Big(1 + \frac{(1 - p) \sum_{l \in S} a_{il}}
              {\sum_{l \in V \setminus S} a_{il}}\Big)\ (j \in V \setminus S)

    with V the image and h the layer's input. A row of a head is edited where it gives V at least
    `summ` of its attention, and of that at most `rho` to visual sinks, those in :math:`V \cap S`.

    Args:
        dims: D, the dimensions in which sinks are large; () until `fit` finds them. Published:
            2533 and 1415 for LLaMA-2-7B, 2100 and 4743 for LLaMA-2-13B.
        tau: the threshold of a sink (20). rho: the largest share of visual sinks (0.5).
        summ: the least attention on the image (0.2). p: what sinks keep (0.6); 1 changes nothing.
        image: V: by default the span "image"; otherwise as in `KeyShift`.
        start: the first layer that is edited, where `layers` names none (2).
        heads, layers, towers, phase: see `Rule`; the method chooses heads row by row, so
            ``heads="all"`` as published.
        fitted: the record of the fit.

    Rows after the image are edited, and those of tokens that are generated. Sinks are tokens of the
    prompt: they are found at prefill and kept, later tokens are never sinks. A row of the batch
    whose image has no visual sink in a layer is left alone there, as are rows that give all of
    their attention on the image to sinks.

    Cost: two attention calls on the chosen heads more; memory O(keys).

    Raises:
        Refused: steering before the dimensions are known; cross-attention, whose layer does not
            hold the states of the tokens attended to.
        AttnbiasError: a number out of range, a dimension that the model does not have.

    Source: See What You Are Told: Visual Attention Sink in Large Multimodal Models, 2025 (arXiv
    2503.03321); authors' code read. As released, and other than in the paper's text, the last layer
    is edited too and the test for sinks is strict. `fit` is ours: the authors list the dimensions
    of two models.
    """

    dims: tuple[int, ...] = ()
    tau: float = 20.0
    rho: float = 0.5
    summ: float = 0.2
    p: float = 0.6
    image: Keys = ("image",)
    start: int = 2
    fitted: SinkFit | None = None

    row_local: ClassVar[bool] = False
    reads_hidden: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "dims", tuple(self.dims))
        object.__setattr__(self, "image", keys_of(self.image))
        if not all(map(is_number, (*self.dims, self.start))):
            raise AttnbiasError(
                f"dims and start must be whole numbers from 0, got {self.dims!r}, {self.start!r}."
            )
        for name, high in (("tau", math.inf), ("rho", 1), ("summ", 1), ("p", 1)):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and 0 <= value <= high):
                raise AttnbiasError(f"{name} must be from 0 to {high:g}, got {value!r}.")

    def ready(self) -> None:
        if not self.dims:
            raise Refused(
                "VAR does not know this model's sink dimensions: write VAR(dims=(...), "
                "heads='all'), or run rule = VAR(heads='all').fit(model, prompts)."
            )

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(key for key in self.image if isinstance(key, str))

    def acts_in(self, tower: str, layer: int, phase: str) -> bool:
        # The sinks are found in the prompt, also where only the steps after it are edited.
        named = self.layers != "all" or bool(self.named_layers())
        phase = self.phase if self.phase == "decode" else phase
        return super().acts_in(tower, layer, phase) and (named or layer >= self.start)

    def sinks(self, site: SiteCall) -> Tensor:
        """The sinks among the tokens of the prompt so far, by position: bool ``(batch, 1, N)``."""
        hidden = site.hidden
        if max(self.dims) >= hidden.shape[-1]:
            raise AttnbiasError(
                f"VAR names dimension {max(self.dims)}, but {site.site} has hidden states of size "
                f"{hidden.shape[-1]}."
            )
        large = normalised(hidden)[..., list(self.dims)].amax(-1) > self.tau
        return together(to_positions(large[:, None], site.query_positions), site.held("sinks"))

    def groups(self, site: SiteCall) -> Tensor:
        kept = site.frozen("sinks", lambda: self.sinks(site))
        sink = at_positions(kept, site.key_positions)
        image = site.where(self.image)[:, None]
        of_image, of_text = (VISUAL_SINK, VISUAL), (TEXT_SINK, OTHER)
        return torch.where(image, torch.where(sink, *of_image), torch.where(sink, *of_text))

    def group_count(self, site: SiteCall, groups: Tensor) -> int:
        return 4

    def queries(self, site: SiteCall) -> Tensor:
        """Those after the image."""
        image = torch.where(site.where(self.image), site.key_positions, -1)
        return site.query_positions > image.amax(-1, keepdim=True)

    def reallocate(self, site: SiteCall, masses: Tensor) -> Tensor | None:
        if self.p == 1 or self.phase not in ("both", site.phase):
            return None
        other, text, visual, rest = masses.unbind(-1)
        looks = visual + rest
        on = (
            self.queries(site)[:, None]
            & (looks >= self.summ)
            & (visual <= self.rho * looks)
            & (rest > 0)
        )
        on = on & self._some(site)
        freed = torch.where(on, (1 - self.p) * (text + visual), 0.0)
        text, visual = (torch.where(on, self.p * part, part) for part in (text, visual))
        return torch.stack([other, text, visual, rest + freed], -1)

    def _some(self, site: SiteCall) -> Tensor:
        """Which rows of the batch have a visual sink here: bool ``(batch, 1, 1)``."""
        table = site.frozen("sinks", lambda: self.sinks(site))
        places = torch.arange(table.shape[2], device=table.device)[None]
        return (table & site.chosen(self.image, places)[:, None]).any(-1, keepdim=True)

    def fit(
        self,
        model: nn.Module,
        prompts: Sequence[Mapping[str, Any]],
        *,
        count: int = 2,
        progress: bool = True,
    ) -> VAR:
        """Find the sink dimensions: where the first token's activation is massive.

        The first token of a text is the sink that every model has, and visual sinks are large in
        the same dimensions. A dimension is taken where the first token's normalised activation,
        on average over prompts and the layers of this rule, is above `tau` and that of the median
        token is not; of these the `count` largest.

        Args:
            model: in eval mode; it is left as it is.
            prompts: mappings of model inputs, such as ``ab.prompt(...).inputs``.
            count: how many dimensions at most.
            progress: show a bar (needs rich; silent without it).

        Cost: one forward per prompt.

        Raises:
            AttnbiasError: no prompts, a model in training mode, no such dimension.
        """
        from attnbias.steer.sinks import find

        return find(self, model, prompts, count, progress)


def normalised(hidden: Tensor) -> Tensor:
    """``|h| / rms(h)`` in float32 (float64), over the last dimension."""
    kind = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    hidden = hidden.to(kind)
    scale = hidden.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
    return (hidden * scale).abs()
