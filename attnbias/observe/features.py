"""Means of features under the rows of the map, from attention with the features as values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from attnbias.observe.scene import Scene

BLOCK = 256  # queries per call where positions have to be centred on their queries
LAG = "lag"


class Features:
    r"""``sum_j p_ij f_j`` for features f that statistics ask for; all share the calls.

    As many features as a head has dimensions cost one unbiased call. Exact under any bias.
    """

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._asked: dict[str, Tensor] = {}
        self._found: dict[str, Tensor] = {}

    def ask(self, name: str, feature: Tensor) -> None:
        """Want the means of features (B, M, F)."""
        self._asked[name] = feature

    def ask_lag(self) -> None:
        """Want `lag`."""
        positions = self._scene.key_positions.to(self._scene.query)
        # The column of ones takes the rounding of the row's sum out of the difference.
        self._asked[LAG] = torch.stack([positions, torch.ones_like(positions)], -1)

    def mean(self, name: str) -> Tensor:
        """(B, H, N, F): the means of the features asked for under `name`."""
        if name not in self._found:
            self._run()
        return self._found[name]

    @property
    def lag(self) -> Tensor:
        r"""(B, H, N): ``sum_j p_ij (i - j)`` in token positions; for causal rows the mean distance.

        Positions are centred on each block of queries: the rounding grows with the distance, not
        with the position.
        """
        return self.mean(LAG)[..., 0]

    def _run(self) -> None:
        scene = self._scene
        names = [n for n in self._asked if n not in self._found]
        widths = [self._asked[n].shape[-1] for n in names]
        step = BLOCK if LAG in names else scene.queries
        starts = range(0, scene.queries, step)
        parts = [self._block(names, slice(s, min(s + step, scene.queries))) for s in starts]
        sums, lse = (torch.cat(list(part), 2) for part in zip(*parts, strict=True))
        scene.set_lse(scene.with_sink(lse))
        if scene.sink is not None:  # the keys shown hold only a part of the row
            sums = sums * torch.exp(lse - scene.with_sink(lse))[..., None]
        for name, part in zip(names, torch.split(sums, widths, -1), strict=True):
            self._found[name] = part

    def _block(self, names: list[str], rows: slice) -> tuple[Tensor, Tensor]:
        """Means over the keys shown, and their log-sum-exp, for some queries."""
        scene = self._scene
        low, high = scene.span(rows)
        middle = scene.query_positions[:, (rows.start + rows.stop) // 2].clamp_min(0)
        packed = [self._asked[n][:, low:high].to(scene.query) for n in names]
        if LAG in names:
            place = sum(p.shape[-1] for p in packed[: names.index(LAG)])
            centred = packed[names.index(LAG)].clone()
            centred[..., 0] -= middle[:, None]
            packed[names.index(LAG)] = centred
        bias = None if scene.bias is None else scene.bias[..., rows, low:high]
        query, key = scene.query[:, :, rows], scene.key[:, :, low:high]
        sums, lse = [], query[..., 0]
        for part in torch.split(torch.cat(packed, -1), scene.width, -1):
            value = torch.nn.functional.pad(part, (0, scene.width - part.shape[-1]))
            value = value[:, None].expand(-1, scene.groups, -1, -1)
            out, lse = scene.attend(query, key, value, bias, False)
            sums.append(out[..., : part.shape[-1]])
        total = torch.cat(sums, -1)
        if LAG in names:
            own = (scene.query_positions[:, rows] - middle[:, None]).to(total)[:, None]
            total[..., place] = own * total[..., place + 1] - total[..., place]
        return total, lse
