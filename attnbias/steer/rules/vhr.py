"""VHR: reinforce the heads whose output changes most when the image is taken away."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnbias.errors import AttnbiasError
from attnbias.steer.branch import Branch
from attnbias.steer.rule import Heads, Rule
from attnbias.steer.site import SiteCall

BRANCH = "without the image"
ROUNDING = 1e-4  # heads that cannot see the image differ by rounding alone


@dataclass(frozen=True, kw_only=True)
class VHR(Rule):
    r"""Scale the outputs of vision-aware heads, found for each prompt layer by layer.

    With :math:`A_{li}` the output of head i of layer l at the prompt's last token (before the
    output projection) and :math:`\bar A_{li}` the same in a branch without the image:

    .. math:: \mathrm{VHD}_{li} = \lVert A_{li} - \bar A_{li} \rVert_2, \qquad
        \mathrm{VHD}_{li} := 0 \text{ if } \mathrm{VHD}_{li} > \mu + \sigma \text{ and }
        \lVert \bar A_{li} \rVert^2 > \mu' + \sigma'

    (means and deviations over the heads of the layer: the rule drops heads that surge when the
    image is gone). Heads whose VHD is above the layer's median are multiplied by :math:`\alpha`, in
    the prompt's forward and in all that follow.

    Args:
        strength: alpha above 0; 1 changes nothing. Published: 2 (4 breaks the model, values below 1
            raise hallucination).
        image: names of spans; several make one.
        outliers: whether the outlier rule acts. Published: True.
        heads, layers, towers, phase: see `Rule`. Published: all heads of the second and the last 14
            layers (LLaVA-1.5-7B: 1 and 18 to 31), of the last 18 for InstructBLIP-7B.

    The heads are chosen once for each row and prompt, from the layers below as they are already
    reinforced. With a prompt in chunks the last chunk decides, and earlier ones were scaled by the
    choice of their own.

    Cost: one prefill of the prompt without the image; nothing afterwards.

    Raises:
        AttnbiasError: a strength that is not above 0, a missing span.

    Source: Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence, 2024.
    Equations read; the authors' code was not. Left open and chosen here: the branch without the
    image is not reinforced, the factor acts at every token of a forward, deviations are those of
    the whole population (divided by the number of heads).
    """

    row_local: ClassVar[bool] = False
    heads: Heads = "all"
    strength: float = 2.0
    image: tuple[str, ...] = ("image",)
    outliers: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "image", tuple(self.image))
        if not (math.isfinite(self.strength) and self.strength > 0):
            raise AttnbiasError(f"strength must be a number above 0, got {self.strength!r}.")

    @property
    def needs(self) -> tuple[str, ...]:
        return self.image

    @property
    def branches(self) -> Mapping[str, Branch]:
        return {BRANCH: Branch(without=self.image)}

    def look(self, site: SiteCall) -> Tensor | None:
        """The heads' outputs at the last token, ``(batch, heads, size)``: wanted in the branch."""
        return _outputs(site) if site.in_branch and site.phase == "prefill" else None

    def divergence(self, site: SiteCall) -> Tensor:
        """VHD of each head ``(batch, heads)``, outliers set to 0."""
        blank: Tensor = site.branch(BRANCH).looked[site.site]
        own = _outputs(site)
        found: Tensor = (own - blank).norm(dim=-1)
        found = found.masked_fill(found <= ROUNDING * own.norm(dim=-1), 0.0)
        if not self.outliers:
            return found
        return found.masked_fill(_surges(found) & _surges(blank.square().sum(-1)), 0.0)

    def outputs(self, site: SiteCall, out: Tensor) -> Tensor | None:
        if self.strength == 1:
            return None

        def choose() -> Tensor:
            found = self.divergence(site)
            return found > found.quantile(0.5, -1, keepdim=True)

        chosen = site.frozen("heads", choose)
        factor = torch.where(chosen, self.strength, 1.0).to(out.dtype)
        return out * factor[..., None, None]


def _outputs(site: SiteCall) -> Tensor:
    row = site.attention(site.last[:, None])
    return (row @ site.value.to(row.dtype))[:, :, 0]


def _surges(values: Tensor) -> Tensor:
    """Which heads lie above the mean by more than a deviation."""
    deviation = values.std(-1, keepdim=True, correction=0)
    return values > values.mean(-1, keepdim=True) + deviation
