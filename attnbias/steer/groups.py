"""The output under other shares, from attention over parts of the keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attnbias.steer.pieces import Piece


class Lane(NamedTuple):
    """The pieces of some rows of the batch."""

    batch: slice
    pieces: list[Piece]


class Exact(NamedTuple):
    """Rows in which the base has little of a row: there it is computed apart, too.

    rows: their numbers, from the first row that is computed. out, lse: the base's.
    """

    rows: Tensor
    out: Tensor
    lse: Tensor


@dataclass(frozen=True)
class Groups:
    """Attention of some heads over each group by itself.

    Attributes:
        first: the first row that is computed; those before cannot change.
        masses: ``(batch, heads, queries, groups)``: the share of each, the sink's left out; 0 (or
            1, where one group is all that a row sees) before `first`.
        base: the group of which the model's own output is taken, -1 where there is none.
        plain: that output ``(batch, queries, heads, value size)``, on all heads.
    """

    heads: tuple[int, ...]
    first: int
    masses: Tensor
    lanes: tuple[Lane, ...]
    lses: Tensor  # (batch, heads, rows from `first` on, groups)
    base: int = -1
    plain: Tensor | None = None
    exact: Exact | None = None

    def write(self, out: Tensor, shares: Tensor) -> None:
        """Put the output under other shares into ``out (batch, queries, heads, value size)``.

        All rows of `heads` from `first` on; where shares are the old ones and there is a base,
        they keep the bits of the model's own.
        """
        whole = len(self.heads) == out.shape[2]
        index = None if whole else torch.tensor(self.heads, device=out.device)
        rows = out[:, self.first :]
        target = rows if index is None else rows.index_select(2, index)
        kind = self.lses.dtype
        make = target.dtype == kind
        sums = (target if make else target.to(kind)).transpose(1, 2)
        shares = shares[:, :, self.first :].to(kind)
        if self.base < 0:
            self._apart(sums, shares)
        else:
            self._beside(sums, shares)
        if not make or index is not None:
            done = sums.transpose(1, 2).to(out.dtype)
            if index is None:
                out[:, self.first :] = done
            else:
                out[:, self.first :, list(self.heads)] = done

    def _apart(self, sums: Tensor, shares: Tensor) -> None:
        for batch, pieces in self.lanes:
            sums[batch].zero_()
            for piece in pieces:
                lse = self.lses[batch][:, :, piece.rows, piece.group]
                part = part_of(piece.lse, lse)
                weight = part * shares[batch][:, :, piece.rows, piece.group]
                _add(sums[batch][:, :, piece.rows], piece.out, weight)

    def _beside(self, sums: Tensor, shares: Tensor) -> None:
        old = self.masses[:, :, self.first :].to(shares)
        ratio = torch.where(old > 0, shares / torch.where(old > 0, old, 1.0), 1.0)
        own = ratio[..., self.base]
        exact = None if self.exact is None else self._exact(sums, shares, (ratio != 1).any(-1))
        if bool((own != 1).any()):
            sums *= own[..., None]
        for batch, pieces in self.lanes:
            for piece in pieces:
                at = (batch, slice(None), piece.rows, piece.group)
                lse = self.lses[at]
                part = part_of(piece.lse, lse) * old[at]
                weight = part * (ratio[at] - own[batch][:, :, piece.rows])
                _add(sums[batch][:, :, piece.rows], piece.out, weight)
        if self.exact is not None and exact is not None:
            sums.index_copy_(2, self.exact.rows, exact)

    def _exact(self, sums: Tensor, shares: Tensor, changed: Tensor) -> Tensor:
        """The rows in which the base has little; those that are not changed stay."""
        assert self.exact is not None
        rows, out, _ = self.exact
        mine = shares.index_select(2, rows)
        found = out.to(sums.dtype) * mine[..., self.base, None]
        for batch, pieces in self.lanes:
            for piece in pieces:
                inside = ((rows >= piece.rows.start) & (rows < piece.rows.stop)).nonzero()[:, 0]
                if not len(inside):
                    continue
                chosen = rows[inside]
                at = chosen - piece.rows.start
                whole = self.lses[batch][..., piece.group].index_select(2, chosen)
                weight = part_of(piece.lse.index_select(2, at), whole)
                weight = weight * mine[batch][..., piece.group].index_select(2, inside)
                more = piece.out.index_select(2, at).to(sums.dtype) * weight[..., None]
                found[batch] = found[batch].index_add(2, inside, more)
        stay = sums.index_select(2, rows)
        return torch.where(changed.index_select(2, rows)[..., None], found, stay)


def part_of(lse: Tensor, whole: Tensor) -> Tensor:
    """The share of a piece in its group; 0 where the group has nothing."""
    return (lse - torch.where(whole == -torch.inf, 0.0, whole)).exp()


def _add(sums: Tensor, out: Tensor, weight: Tensor) -> None:
    sums.addcmul_(out.to(sums.dtype), weight[..., None].to(sums.dtype))
