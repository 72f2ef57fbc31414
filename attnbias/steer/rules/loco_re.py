"""LocoRE: what was just written gets a little more attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from attnbias.bias import Bias, Bucketed, KeyBias
from attnbias.errors import AttnbiasError
from attnbias.steer.rule import Rule, is_number
from attnbias.steer.site import SiteCall
from attnbias.steer.spans import Keys, keys_of


@dataclass(frozen=True, kw_only=True)
class LocoRE(Rule):
    r"""Multiply the attention on the last few generated tokens by ``1 + beta``, and normalise.

    .. math:: B_{ij} = \log(1 + \beta)\,[\,g \le j,\ 1 \le i - j \le w\,]

    with g the first generated position.

    Args:
        beta: the gain, from 0; 0.15 as published for LLaVA-1.5 (0.20 for Qwen2-VL; 1.0 is reported
            to collapse).
        window: w, how many tokens before the query; 5 (not published: the number of accepted
            scores that the same work averages).
        written: the tokens of the answer: from the first of them on; the span "generated".
        layers: as published 9 to 14 of 32: ``layers=range(9, 15)``.
        heads, towers, phase: see `Rule`; as published all heads.

    Cost: memory O(keys) in decoding, O(generated squared) in a prefill that holds generated text.

    Raises:
        AttnbiasError: a gain below 0, a window that is no whole number above 0.

    Source: Hallucination Begins Where Saliency Drops (SGRS and LocoRE), 2026 (arXiv 2601.20279);
    authors' code read, but the class that it calls for LocoRE is missing there. Chosen here: the
    window, that the query's own token is not counted ("its most recent predecessors"), and that
    rows are normalised again, as a public port for Qwen2.5-VL does.
    """

    layers_alike: ClassVar[bool] = True
    beta: float = 0.15
    window: int = 5
    written: Keys = ("generated",)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "written", keys_of(self.written))
        if isinstance(self.beta, bool) or not (math.isfinite(self.beta) and self.beta >= 0):
            raise AttnbiasError(f"beta must be a finite number from 0, got {self.beta!r}.")
        if not is_number(self.window) or self.window == 0:
            raise AttnbiasError(f"window must be a whole number above 0, got {self.window!r}.")

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(key for key in self.written if isinstance(key, str))

    def bias(self, site: SiteCall) -> Bias | None:
        written = site.where(self.written)
        if self.beta == 0 or not bool(written.any()):
            return None
        gain = math.log1p(self.beta)
        keys = site.key_positions.masked_fill(~written, -1)
        first = torch.where(keys >= 0, keys, torch.iinfo(keys.dtype).max).amin(-1, keepdim=True)
        cols = torch.where(keys >= 0, keys - first + 1, 0)  # class 0: not generated
        number = torch.arange(1, int(cols.max()) + 1, device=cols.device)
        # How far each query stands behind each generated token: (batch, queries, generated).
        far = (site.query_positions - first + 1)[..., None] - number
        near = (far >= 1) & (far <= self.window)
        table = torch.zeros(near.shape, dtype=site.dtype, device=near.device)
        table = torch.nn.functional.pad(table.masked_fill(near, gain), (1, 0))[:, None]
        if site.shape[2] == 1:
            return KeyBias(table[:, 0].gather(2, cols[:, None].expand(len(table), -1, -1)))
        return Bucketed(table, None, cols[:, None])
