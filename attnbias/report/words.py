"""What each word of a text receives, beside the same words shuffled and random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnbias.report import interval
from attnbias.report.data import Word
from attnbias.report.even import Even
from attnbias.report.kinds import RECEIVED
from attnbias.report.text import Read

if TYPE_CHECKING:
    from attnbias.hub import Site
    from attnbias.observe import Seen

NAMED = 20
"""Words that receive most, whose interval is computed."""


def words_of(
    text: Read,
    order: tuple[int, ...],
    even: dict[Site, Even],
    runs: tuple[Seen, Seen, Seen],
    seed: int,
) -> tuple[Word, ...]:
    """The words of `text` with what they receive; `order` is that of the shuffled text.

    Args:
        even: the even attention of each site. runs: this text, shuffled, with random weights.
        seed: of the bootstrap over the heads.
    """
    flat = torch.stack([one.received / one.queries for one in even.values()])  # (layers, keys)
    heads = [_received(seen, even) for seen in runs]  # (layers, heads, keys)
    own, mixed, born = (one.nanmean(1) for one in heads)
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))  # old position -> new position
    starts = torch.tensor([piece.start for piece in text.words])
    stops = torch.tensor([piece.stop for piece in text.words])

    def within(values: Tensor, at: Tensor) -> Tensor:
        """Sums over runs of tokens that begin `at` (words stay whole when they move)."""
        total = torch.nn.functional.pad(values.cumsum(-1), (1, 0))
        return total[..., at + (stops - starts)] - total[..., at]

    base, moved = within(flat, starts), within(flat, back[starts])
    by_layer = within(own, starts) / base
    received = by_layer.mean(0)
    low, high = torch.full((2, len(starts)), torch.nan, dtype=torch.float64)
    named = received.topk(min(NAMED, len(starts))).indices
    each = (within(heads[0], starts)[..., named] / base[:, None, named]).flatten(0, 1)
    low[named], high[named] = interval.over_rows(each[~each.isnan().any(-1)], seed)
    share = within(own, starts).mean(0)
    columns = torch.stack([
        share, received, (within(mixed, back[starts]) / moved).mean(0),
        (within(mixed, starts) / base).mean(0), (within(born, starts) / base).mean(0), low, high,
    ], -1).tolist()  # fmt: skip
    layers = by_layer.T.tolist()
    return tuple(
        Word(
            text=piece.text, special=piece.special, tokens=(piece.start, piece.stop), share=s,
            received=r, by_layer=tuple(layers[n]), shuffled=m, in_place=p, random=b, gap=piece.gap,
            low=lo, high=hi,
        )
        for n, (piece, (s, r, m, p, b, lo, hi)) in enumerate(
            zip(text.words, columns, strict=True)
        )
    )  # fmt: skip


def _received(seen: Seen, even: dict[Site, Even]) -> Tensor:
    """(layers, heads, keys): share of a query's attention that each key receives."""
    rows = []
    for site in even:
        tensor = seen.tensor(RECEIVED, site.tower)
        rows.append(tensor.select(layer=site.layer, run=0, batch=0).values)
    most = max(len(row) for row in rows)
    return torch.stack([
        torch.nn.functional.pad(row, (0, 0, 0, most - len(row)), value=torch.nan) for row in rows
    ])  # fmt: skip
