"""Means of features under the rows of the map, from attention with the features as values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnbias.attention import merge
from attnbias.bias import Window

if TYPE_CHECKING:
    from attnbias.observe.scene import Scene

NEAR = 16  # queries that share one origin of the positions
GAP = "gap"


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

    def ask_gap(self) -> None:
        """Want `gap`."""
        self._asked[GAP] = self._scene.query.new_empty(0)

    def mean(self, name: str) -> Tensor:
        """(B, H, N, F): the means of the features asked for under `name`."""
        if name not in self._found:
            self._run()
        return self._found[name]

    @property
    def gap(self) -> Tensor:
        r"""(B, H, N): ``sum_j p_ij |i - j|`` in token positions, within one sequence.

        The mean position of the keys up to the query and of those after it, each half of a call.
        A call has one feature for each 16 queries, the position counted from there: the rounding
        grows with the distance, not with the position.
        """
        return self.mean(GAP)[..., 0]

    def asked(self) -> Tensor | None:
        """(B, M, F): every feature asked for so far and not found yet, side by side."""
        names = [n for n in self._asked if n not in self._found and n != GAP]
        return (
            torch.cat([self._asked[n].to(self._scene.query) for n in names], -1) if names else None
        )

    def take(self, means: Tensor | None, gap: Tensor | None) -> None:
        """The means of `asked` (B, H, N, F), and the gap (B, H, N), as a sweep has found them."""
        names = [n for n in self._asked if n not in self._found and n != GAP]
        widths = [self._asked[n].shape[-1] for n in names]
        if means is not None:
            for name, part in zip(names, torch.split(means, widths, -1), strict=True):
                self._found[name] = part
        if gap is not None:
            self._found[GAP] = gap[..., None]

    def _run(self) -> None:
        scene = self._scene
        names = [n for n in self._asked if n not in self._found and n != GAP]
        widths = [self._asked[n].shape[-1] for n in names]
        asked = [self._asked[n].to(scene.query) for n in names]
        fixed = torch.cat(asked, -1) if asked else None
        step, origins = scene.queries, 0
        if GAP in self._asked and GAP not in self._found:
            free = scene.width - 1 - sum(widths)
            origins = free if free >= min(7, scene.width - 1) else scene.width - 1
            origins = max(min(origins, -(-scene.queries // NEAR)), 1)
            step = origins * NEAR
        starts = range(0, scene.queries, step)
        parts = [
            self._block(fixed, slice(n, min(n + step, scene.queries)), origins) for n in starts
        ]
        sums, lse = (torch.cat(list(part), 2) for part in zip(*parts, strict=True))
        lse = lse + scene.shift
        scene.set_lse(scene.with_sink(lse))
        if scene.sink is not None:  # the keys shown hold only a part of the row
            sums = sums * torch.exp(lse - scene.with_sink(lse))[..., None]
        if origins:
            names, widths = [*names, GAP], [*widths, 1]
        for name, part in zip(names, torch.split(sums, widths, -1), strict=True):
            self._found[name] = part

    def _block(self, fixed: Tensor | None, rows: slice, origins: int) -> tuple[Tensor, Tensor]:
        """Means over the keys shown, with the gap last, and their log-sum-exp, of some queries."""
        scene = self._scene
        if origins == 0:
            assert fixed is not None
            return self._means(fixed, rows, scene.span(rows), None)
        positions = scene.query_positions[:, rows]
        short = torch.nn.functional.pad(positions, (0, -positions.shape[1] % NEAR), value=-1)
        origin = short.unfold(-1, NEAR, NEAR).amax(-1) - NEAR // 2  # (B, origins), -1 is padding
        counted = (scene.key_positions[..., None] - origin[:, None]).to(scene.query)
        # The column of ones takes the rounding of the row's sum out of the difference.
        columns = [counted, torch.ones_like(counted[..., :1])]
        values = torch.cat(columns if fixed is None else [fixed, *columns], -1)
        place = torch.arange(positions.shape[1], device=scene.device) // NEAR
        own = (positions - origin[:, place]).to(values)[:, None]
        first = values.shape[-1] - 1 - origin.shape[1]
        index = (first + place)[None, None, :, None].expand(scene.batch, scene.heads, -1, 1)
        parts = []
        for sign, span, half in self._halves(rows):
            sums, lse = self._means(values, rows, span, half)
            gap = sign * (own * sums[..., -1] - sums.gather(-1, index)[..., 0])
            parts.append((torch.cat([sums[..., :first], gap[..., None]], -1), lse))
        return merge(parts)

    def _halves(self, rows: slice) -> list[tuple[int, tuple[int, int], Window | None]]:
        """(sign of i - j, keys, mask) of the keys up to each query and of those after it."""
        scene = self._scene
        low, high = scene.span(rows)
        if scene.causal:
            return [(1, (low, high), None)]
        assert scene.own_slot is not None
        first, last = scene.own_slot + rows.start, scene.own_slot + rows.stop
        halves: list[tuple[int, tuple[int, int], Window | None]] = []
        for sign, start, stop in ((1, low, min(high, last)), (-1, max(low, first + 1), high)):
            if stop > start:
                size = {"queries": rows.stop - rows.start, "keys": stop - start}
                before, after = (None, 0) if sign == 1 else (-1, None)
                mask = Window(before, after, **size, offset=first - start, device=scene.device)
                halves.append((sign, (start, stop), mask))
        return halves or [(1, (low, low), None)]

    def _means(
        self, values: Tensor, rows: slice, span: tuple[int, int], half: Window | None
    ) -> tuple[Tensor, Tensor]:
        scene, keys = self._scene, slice(*span)
        bias = None if scene.bias is None else scene.bias[..., rows, keys]
        if half is not None:
            bias = half if bias is None else bias + half
        query, key = scene.query[:, :, rows], scene.centred[:, :, keys]
        sums, lse = [], query[..., 0]
        for part in torch.split(values[:, keys], scene.width, -1):
            value = torch.nn.functional.pad(part, (0, scene.width - part.shape[-1]))
            value = value[:, None].expand(-1, scene.groups, -1, -1)
            out, lse = scene.attend(query, key, value, bias, False)
            sums.append(out[..., : part.shape[-1]])
        return torch.cat(sums, -1), lse
