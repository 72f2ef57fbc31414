"""Heads taken out of a model: their output zero, or the plain mean of what they see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnbias.errors import AttnbiasError
from attnbias.steer.hooks import Vectors
from attnbias.steer.rule import Rule
from attnbias.steer.site import SiteCall


@dataclass(frozen=True, kw_only=True)
class BlockHeads(Rule):
    r"""Block chosen heads.

    .. math:: o_i = 0 \quad\text{or}\quad o_i = \frac{1}{n_i} \sum_{j \text{ visible}} v_j

    Args:
        mode: ``"zero"``: the heads' outputs are zero; ``"uniform"``: their queries are zero, so
            that they attend to all visible keys alike (apart from a position bias of the model);
            None blocks nothing.
        heads, layers, towers, phase: see `Rule`.

    Cost: none for ``"zero"``; one attention call on the chosen heads for ``"uniform"``.

    Raises:
        AttnbiasError: an unknown mode.

    Source: the ablation that works on retrieval heads use; DeCoRe (2024) means the first and its
    released code does the second.
    """

    mode: Literal["zero", "uniform"] | None = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("zero", "uniform", None):
            raise AttnbiasError(f"mode must be 'zero', 'uniform' or None, got {self.mode!r}.")

    def vectors(self, site: SiteCall) -> Vectors | None:
        return Vectors(query=torch.zeros_like(site.query)) if self.mode == "uniform" else None

    def outputs(self, site: SiteCall, out: Tensor) -> Tensor | None:
        return torch.zeros_like(out) if self.mode == "zero" else None
