"""A run: the forwards that continue the same sequences, at one site."""

from __future__ import annotations

import torch
from torch import Tensor

from attnbias.errors import Refused
from attnbias.observe.scene import Scene
from attnbias.observe.statistic import Gathered, Statistic


class Run:
    """The sums of all statistics over one prefill and the forwards that continue it.

    Per-query sums are laid out by the position of the query, per-key sums by that of the key, for
    each row of the batch. Memory O(tokens) for each statistic, head and row.
    """

    def __init__(self, statistics: list[Statistic], scene: Scene) -> None:
        self.site = scene.site
        self.statistics = statistics
        self._parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in statistics]
        self._totals: list[Tensor | None] = [None] * len(statistics)
        self._queries = torch.zeros(scene.batch, scene.heads, device=scene.device)
        self._last = torch.full((scene.batch,), -1, device=scene.device)
        self._marks: Tensor | None = None

    def add(self, scene: Scene, sums: list[Tensor]) -> None:
        """Take in the sums of one more call."""
        self._queries += scene.counted.sum(-1)
        for place, found in enumerate(sums):
            self._take(place, scene, found)
        self._settle(scene)

    def _take(self, place: int, scene: Scene, found: Tensor) -> None:
        """Take in the sums of one statistic over all queries of a call."""
        if self.statistics[place].over == "query":
            counted = scene.counted
            shown = counted if found.ndim == 3 else counted[..., None]
            values = torch.where(shown, found, torch.nan).to(scene.query)
            self._parts[place].append((scene.query_positions, values))
        else:
            self._add_total(place, scene, found)

    def _add_total(self, place: int, scene: Scene, found: Tensor) -> None:
        total = self._totals[place]
        if self.statistics[place].over == "sequence":
            self._totals[place] = found if total is None else total + found
        else:
            self._totals[place] = grown(total, scene.key_positions, found)

    def _settle(self, scene: Scene) -> None:
        """Remember where the call stopped."""
        self._last = torch.maximum(self._last, scene.query_positions.amax(-1))
        self._marks = _marks(scene, self._last)

    def gathered(self, place: int) -> Gathered:
        """The sums of one statistic so far."""
        queries = self._queries.double()
        total = self._totals[place]
        if self.statistics[place].over != "query":
            assert total is not None
            return Gathered(total.clone(), queries)
        return Gathered(laid_out(self._parts[place]), queries)

    @property
    def device(self) -> torch.device:
        """Where the sums lie."""
        return self._queries.device

    def size(self) -> dict[str, int]:
        """Rows of the batch, heads, and the number of tokens of the longest row."""
        batch, heads = self._queries.shape
        return {"batch": batch, "heads": heads, "tokens": int(self._last.amax()) + 1}

    def check(self, scene: Scene) -> None:
        """Raise where the call does not go on where the last one stopped, row for row."""
        if scene.batch != len(self._last):
            raise Refused(
                f"the batch went from {len(self._last)} to {scene.batch} rows within one "
                "generation; observe() cannot tell which row is which. Run one forward over the "
                "finished sequences."
            )
        first = scene.query_positions.masked_fill(~scene.real, torch.iinfo(torch.long).max).amin(-1)
        begun = scene.real.any(-1)
        if bool((begun & (first != self._last + 1)).any()):
            row = int((begun & (first != self._last + 1)).nonzero()[0])
            raise Refused(
                f"row {row} goes on at token {int(first[row])} after token {int(self._last[row])}: "
                "observe() follows a generation step by step and cannot take steps back (assisted "
                "decoding, a shortened cache). Run one forward over the finished sequences."
            )
        if scene.site.kind == "self" and self._marks is not None and scene.batch > 1:
            self._check_rows(scene)

    def _check_rows(self, scene: Scene) -> None:
        """The key of the last token must still be in its own row: beam search exchanges rows."""
        now, before = _marks(scene, self._last), self._marks
        assert before is not None
        if now is None:
            return
        far = torch.cdist(now, before)
        # Caches may quantise, so the own row need only be the nearest (to within rounding).
        own = far.diagonal()
        if bool((far.amin(-1) < 0.5 * own).any()):
            raise Refused(
                "the rows of the batch changed places between two steps (beam search); observe() "
                "would mix sequences. Write num_beams=1, or run one forward over the finished "
                "sequences."
            )


def _marks(scene: Scene, last: Tensor) -> Tensor | None:
    """(B, G d): the key of the last token of each row; None where it has left the window."""
    here = (scene.key_positions == last[:, None]) & (last >= 0)[:, None]
    if not bool((here.any(-1) | (last < 0)).all()):
        return None
    slot = here.long().argmax(-1)
    index = slot[:, None, None, None].expand(-1, scene.groups, 1, scene.width)
    return scene.key.gather(2, index).flatten(1) * (last >= 0)[:, None]


def grown(
    total: Tensor | None, positions: Tensor, found: Tensor, kind: torch.dtype = torch.float64
) -> Tensor:
    """Add per-key sums by position; NaN marks positions that a row does not have."""
    batch, heads = found.shape[:2]
    length = int(positions.amax()) + 1 if positions.numel() else 0
    have = 0 if total is None else total.shape[2]
    size = max(length, have)
    grown = torch.full(
        (batch, heads, size, *found.shape[3:]), torch.nan, dtype=kind, device=found.device
    )
    if total is not None:
        grown[:, :, :have] = total
    for row in range(batch):
        slots = (positions[row] >= 0).nonzero()[:, 0]
        at = positions[row, slots]
        grown[row][:, at] = grown[row][:, at].nan_to_num(0.0) + found[row][:, slots].to(kind)
    return grown


def laid_out(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Per-query values by position, the parts one after the other."""
    positions = torch.cat([p for p, _ in parts], -1)
    values = torch.cat([v for _, v in parts], 2)
    size = int(positions.amax()) + 1 if positions.numel() else 0
    batch, heads = values.shape[:2]
    laid = torch.full(
        (batch, heads, size, *values.shape[3:]),
        torch.nan,
        dtype=torch.float64,
        device=values.device,
    )
    for row in range(batch):
        slots = (positions[row] >= 0).nonzero()[:, 0]
        laid[row][:, positions[row, slots]] = values[row][:, slots].double()
    return laid
