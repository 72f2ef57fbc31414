"""Split-softmax: raise the share of the system prompt to a power below one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnbias.errors import AttnbiasError
from attnbias.steer.rule import Phase, Rule
from attnbias.steer.site import SiteCall
from attnbias.steer.spans import Keys, keys_of


@dataclass(frozen=True, kw_only=True)
class SplitSoftmax(Rule):
    r"""Give the chosen keys :math:`\pi^k` of a row's attention where they had :math:`\pi`.

    .. math:: a'_j = \frac{\pi^k}{\pi}\, a_j \ (j \in K), \quad
              a'_j = \frac{1 - \pi^k}{1 - \pi}\, a_j \ (j \notin K), \quad
              \pi = \sum_{j \in K} a_j

    Ratios inside K and outside K stay. The pull is strong where the prompt is nearly forgotten and
    vanishes where it has all the attention: it answers the decay of :math:`\pi` over a dialogue.

    Args:
        power: k in (0, 1]; 1 changes nothing, smaller is stronger. The paper sweeps it and
            publishes no default.
        keys: the set K: by default the span "system"; otherwise as in `KeyShift`.
        phase: as published only the tokens that are generated look so, ``"decode"``; ``"both"``
            edits the prompt's own rows too.
        heads, layers, towers: see `Rule`.

    A row that sees nothing of K, or nothing else, stays as it is. In models with a sink logit
    :math:`\pi` is the share of K among the keys, and the sink keeps what it has.

    Cost: two attention calls on the chosen heads more (one for the shares, one for the result);
    memory O(keys).

    Raises:
        AttnbiasError: a power outside (0, 1].

    Source: Measuring and Controlling Instruction (In)Stability in Language Model Dialogs, 2024
    (arXiv 2402.10962); equations read, in an independent full-text account. The authors' public
    code only measures. Left open there and chosen here: all layers unless `layers` says otherwise,
    the heads as typed, and the sink logit, which their models do not have.
    """

    power: float
    keys: Keys = ("system",)
    phase: Phase = "decode"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "keys", keys_of(self.keys))
        number = isinstance(self.power, (int, float)) and not isinstance(self.power, bool)
        if not (number and 0 < self.power <= 1):
            raise AttnbiasError(f"power must be above 0 and at most 1, got {self.power!r}.")

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(key for key in self.keys if isinstance(key, str))

    def groups(self, site: SiteCall) -> Tensor:
        return site.where(self.keys).long()[:, None]

    def group_count(self, site: SiteCall, groups: Tensor) -> int:
        return 2

    def reallocate(self, site: SiteCall, masses: Tensor) -> Tensor | None:
        if self.power == 1:
            return None
        both = (masses > 0).all(-1)
        rest, inside = (torch.where(both, part, 0.5) for part in masses.unbind(-1))
        total = rest + inside
        # Either share may be tiny: the logarithm of pi from the smaller of the two.
        log = torch.where(
            inside < rest,
            (inside / total).log(),
            torch.log1p(-torch.where(inside < rest, 0.0, rest / total)),
        )
        new = torch.stack([-torch.expm1(self.power * log), (self.power * log).exp()], -1)
        return torch.where(both[..., None], new * total[..., None], masses)
