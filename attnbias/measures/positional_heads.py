"""PositionalHeads: heads whose slow rotary dimensions take over as tokens stand further apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError, Refused
from attnbias.measures.base import Data, HeadMeasure, bar, evaluating, forwards
from attnbias.measures.scores import Scores, gather
from attnbias.measures.texts import text_rows
from attnbias.steer import reading
from attnbias.steer.rule import Heads, Rule
from attnbias.steer.site import SiteCall


@dataclass(frozen=True)
class Pairs:
    """The rotated pairs of dimensions of one layer, the fastest first.

    Attributes:
        members: ``(pairs, 2)`` dimensions of a head that turn together.
        angles: ``(pairs,)`` radians for each position; falling.
    """

    members: Tensor
    angles: Tensor


def pairs_of(site: SiteCall) -> Pairs:
    """The pairs of a layer's own rotary embedding, read off what it does to each basis vector.

    Both layouts (neighbours; one from each half) and partial rotation come out alike. Dimensions
    that do not turn are in no pair.

    Raises:
        Refused: a layer without a rotary embedding that can be moved.
    """
    size = site.query.shape[-1]
    basis = torch.eye(size, dtype=torch.float64, device=site.device)[None, None]
    one = torch.ones(1, size, dtype=torch.long, device=site.device)
    turned = site.rotated(basis, one)[0, 0]  # row d: what becomes of dimension d
    off = (turned - turned.diagonal().diag()).abs()
    found = []
    for first in range(size):
        other = int(off[first].argmax())
        if other > first and float(off[first, other]) > 0:
            angle = torch.atan2(off[first, other], turned[first, first])
            found.append((float(angle), first, other))
    if not found:
        raise Refused(f"{site.site} rotates no dimension.")
    found.sort(key=lambda pair: (-pair[0], pair[1]))
    members = torch.tensor([pair[1:] for pair in found], device=site.device)
    return Pairs(members, torch.tensor([pair[0] for pair in found], dtype=torch.float64))


def parts_of(query: Tensor, key: Tensor, pairs: Pairs) -> Tensor:
    r"""What each pair adds to ``q . k``: ``(..., pairs)`` of vectors ``(..., dim)``."""
    product = query * key
    return product[..., pairs.members].sum(-1)


@dataclass(frozen=True, kw_only=True)
class _Sampler(Rule):
    """Correlates the leading pair with the distance at every layer, and changes nothing."""

    heads: Heads = "all"
    measure: PositionalHeads
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def look(self, site: SiteCall) -> bool:
        pairs = pairs_of(site)
        queries, keys = (n.to(site.device) for n in self.measure.draw(site.shape[2]))
        allowed = _visible(site, keys)
        queries, keys = queries[allowed], keys[allowed]
        distance = (queries - keys).double()
        lines, shares = [], []
        for head in range(site.shape[1]):
            query, key = (v[0, head].double() for v in (site.query, site.key))
            parts = parts_of(query[queries], key[keys], pairs)
            share = parts.softmax(-1)
            lines.append(
                correlation(self.measure.index_of(parts, share), distance, self.measure.by)
            )
            shares.append(share.mean(0))
        self.found[site.site.layer] = (torch.stack(lines), torch.stack(shares), pairs.angles)
        return True


def _visible(site: SiteCall, keys: Tensor) -> Tensor:
    """Which of the draws the layer's own masks let attend (a window hides some): ``(draws,)``."""
    scene = reading.scene(site._edit, site.heads)
    if scene.own is None:
        return torch.ones_like(keys).bool()
    return (scene._picked(scene.own, 0, keys.reshape(scene.queries, -1))[0] > -torch.inf).flatten()


def correlation(x: Tensor, y: Tensor, by: str) -> Tensor:
    """Pearson's correlation of ``(draws,)``, of the numbers or of their ranks; NaN where one never
    changes."""
    if by == "spearman":
        x, y = _ranks(x), _ranks(y)
    x, y = x - x.mean(), y - y.mean()
    size = (x.square().sum() * y.square().sum()).sqrt()
    return torch.where(size > 0, (x * y).sum() / size, torch.nan)


def _ranks(x: Tensor) -> Tensor:
    """Ranks from 1; equal numbers share the mean of theirs."""
    _, which, counts = torch.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    found: Tensor = (last - (counts.double() - 1) / 2)[which]
    return found


@dataclass(frozen=True)
class PositionalHeads(HeadMeasure):
    r"""How strongly a head's leading rotary dimension grows with the distance of two tokens.

    .. math:: g_i = q_{m,2i} k_{n,2i} + q_{m,2i+1} k_{n,2i+1}, \qquad \sum_i g_i = q_m \cdot k_n,
        \qquad \mathrm{score} = \mathrm{corr}\bigl(\arg\max_i \mathrm{softmax}(g)_i,\ m - n\bigr)

    over sampled tokens n before m, with queries and keys after the rotation and the pairs of
    dimensions in order of falling frequency ("higher" dimensions turn slower). Heads with a strong
    positive correlation are Positional Heads. Rows of samples are texts, run one by one without
    padding.

    Args:
        count: keys drawn for each query, with replacement; about 100 in a re-implementation.
        index: "argmax": the leading pair; "expected": the mean pair under the softmax.
        by: "pearson" or "spearman" (ranks, equal ones sharing theirs).
        seed: of the draws, which are the same for all layers, heads and texts of a length.

    Returns:
        `Scores`; NaN where the leading pair or the distance never changes. details: "shares"
        ``(layers, heads, pairs)``, the mean softmax over the pairs (the allocation of attention to
        dimensions), and "angles" ``(layers, pairs)``, radians for each position.

    Cost: one forward and ``tokens * count`` products for each head and text.

    Raises:
        AttnbiasError: numbers out of range.
        Refused: layers without a rotary embedding, or with one on several axes.

    Source: after On the token distance modeling ability of higher RoPE attention dimension, 2024
    (arXiv 2410.08703); a third-party implementation read, which draws keys on the wrong side of the
    query; here only keys that the query may see are drawn. Left open by what was read and chosen
    here: the leading pair by argmax, Pearson's correlation; and no cut: use ``scores.above(t)``.
    """

    name: ClassVar[str] = "positional"
    count: int = 100
    index: Literal["argmax", "expected"] = "argmax"
    by: Literal["pearson", "spearman"] = "pearson"
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.count, int) or isinstance(self.count, bool) or self.count < 1:
            raise AttnbiasError(f"count must be a whole number from 1, got {self.count!r}.")
        if self.index not in ("argmax", "expected"):
            raise AttnbiasError(f"index must be 'argmax' or 'expected', got {self.index!r}.")
        if self.by not in ("pearson", "spearman"):
            raise AttnbiasError(f"by must be 'pearson' or 'spearman', got {self.by!r}.")

    def draw(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Numbers of queries and of keys up to them, ``(tokens * count,)`` each."""
        generator = torch.Generator().manual_seed(self.seed)
        queries = torch.arange(tokens).repeat_interleave(self.count)
        share = torch.rand(len(queries), generator=generator, dtype=torch.float64)
        return queries, (share * (queries + 1)).long()

    def index_of(self, parts: Tensor, share: Tensor) -> Tensor:
        """The leading pair ``(draws,)`` of contributions and their softmax ``(draws, pairs)``."""
        if self.index == "argmax":
            return parts.argmax(-1).double()
        return share @ torch.arange(share.shape[-1], dtype=share.dtype, device=share.device)

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> Scores:
        from attnbias.steer.context import steer
        from attnbias.steer.states import tower_of

        given = forwards(data, "PositionalHeads")
        rows = [row for forward in given for row in text_rows(forward, "PositionalHeads")]
        parts, shares = [], []
        with evaluating(model), torch.no_grad(), bar(len(rows), self.name, progress) as tick:
            reader = _Sampler(measure=self)
            tower = tower_of(reader, model, prefer="text")
            for row in rows:
                reader = _Sampler(measure=self, towers=(tower,))
                with steer(model, reader):
                    model(**row)
                layers = sorted(reader.found)
                parts.append(torch.stack([reader.found[n][0] for n in layers])[None].cpu())
                shares.append(torch.stack([reader.found[n][1] for n in layers]).cpu())
                tick()
        details = {
            "shares": torch.stack(shares).mean(0),
            "angles": torch.stack([reader.found[n][2] for n in layers]),
        }
        return Scores(self.name, tower, tuple(layers), gather(parts), details=details)
