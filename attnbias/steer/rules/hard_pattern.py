"""A hard attention pattern for the last query of some heads: the repair of a circuit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from attnbias.bias import Bias
from attnbias.errors import AttnbiasError
from attnbias.steer.placing import on_last
from attnbias.steer.rule import Phase, Rule
from attnbias.steer.site import SiteCall
from attnbias.steer.spans import Keys, keys_of


@dataclass(frozen=True, kw_only=True)
class HardPattern(Rule):
    r"""Replace the last query's row of attention by equal shares on chosen keys.

    .. math:: A_{ij} \leftarrow (1 - s)\, A_{ij} + s\, \frac{[j \in K]}{|K|} \qquad (i \text{ last})

    Values and everything else are untouched. K counts the chosen keys that the query sees; where it
    sees none, the row stays.

    Args:
        keys: K: names of spans, positions, ranges, or a list of these (as published the two wrong
            colours of a Colored Objects prompt, half each).
        strength: s from 0 to 1; 1 as published, less mixes the pattern with the model's own row.
        heads: as published 12.3, 13.4, 13.13 and 19.1 of GPT-2 Medium:
            ``heads={12: [3], 13: [4, 13], 19: [1]}``.
        phase: ``"prefill"`` by default: the answer is read after one forward.
        layers, towers: see `Rule`.

    Cost: one row of scores; one attention call of the chosen heads on that row.

    Raises:
        AttnbiasError: a strength outside of 0 to 1.

    Source: Circuit Component Reuse Across Tasks in Transformer Language Models, 2023 (arXiv
    2310.08744); the edit was read in an indexed intervention script that runs these heads and
    plots the paper's figure, as the authors' repository holds only the path patching. Chosen here:
    the strength, and that rules before this one act on the model's row, not on the pattern.
    """

    keys: Keys
    strength: float = 1.0
    phase: Phase = "prefill"

    row_local = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "keys", keys_of(self.keys))
        given = self.strength
        if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 <= given <= 1:
            raise AttnbiasError(f"strength must be a number from 0 to 1, got {given!r}.")

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(key for key in self.keys if isinstance(key, str))

    def bias(self, site: SiteCall) -> Bias | None:
        if self.strength == 0:
            return None
        rows = site.last[:, None]
        scores = site.scores(rows)
        seen = scores > -torch.inf
        chosen = site.where(self.keys)[:, None, None] & seen
        count = chosen.sum(-1, keepdim=True)
        sink = site.sink
        whole = scores
        if sink is not None:
            own = sink.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
            whole = torch.cat([scores, own], -1)
        # A row of padding sees nothing: any numbers without NaN do, also in its gradient.
        whole = torch.where((whole == -torch.inf).all(-1, keepdim=True), 0.0, whole)
        share = scores - whole.logsumexp(-1, keepdim=True)  # log of the row as it is
        even = -count.clamp(min=1).log().to(scores.dtype)
        if self.strength < 1:
            gain = even + math.log(self.strength) - math.log1p(-self.strength) - share
            line = torch.where(chosen, torch.nn.functional.softplus(gain), 0.0)
        else:
            # The pattern's scores are all alike, and far above a sink, which gets nothing.
            level = torch.zeros_like(even)
            if sink is not None:
                level = whole[..., -1:].clamp(min=0) + 40.0
            line = torch.where(chosen, level - scores, -torch.inf)
        return on_last(site, torch.where(count > 0, line, 0.0))
