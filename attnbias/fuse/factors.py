"""Pair biases of low rank, measured on a model's own pairs: an approximation, asked for by name.

.. code-block:: python

    found = ab.fuse.learn(model, proteins, rank=16)  # prints what each module loses
    with ab.fuse(model, factors=found):
        ...
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnbias.attention import attention
from attnbias.bias import Bias, Dense
from attnbias.errors import AttnbiasError, Refused
from attnbias.fuse.find import find
from attnbias.fuse.pairs import FACTORS, TriangleFamily, pair_bias, pair_features
from attnbias.fuse.truncation import Truncation
from attnbias.hub.modes import evaluating
from attnbias.hub.sites import unwrap

if TYPE_CHECKING:
    from attnbias.fuse.door import Door
    from attnbias.fuse.family import Place
    from attnbias.fuse.fused import Fused

SAMPLE = 4  # rows of pairs whose attention is compared


@dataclass(frozen=True)
class Learned:
    """What stands for the bias of one module, and what it loses.

    Attributes:
        networks: a `Truncation`, or `Networks` of `pair_features`.
        kept: share of the squared entries of the bias that networks give on the data of the fit.
        kept_held, output_held: the same on the protein that was held out, and the largest error of
            the attention output over its largest value there.
        best_held: share that the best matrix of this rank would keep there.
    """

    networks: nn.Module = field(repr=False)
    kept: float
    kept_held: float
    output_held: float
    best_held: float


@dataclass(frozen=True)
class Factors:
    """What `learn` found for triangle attention modules, by name.

    Attributes:
        model: class name. rank: columns of the factors. sites: dotted name of a module to what was
            learned for it.
    """

    model: str
    rank: int
    sites: Mapping[str, Learned]

    def plan(self, fused: Fused, places: Sequence[Place], door: Door) -> None:
        """Plan the factors of a model's modules; its report names them."""
        known = {one.name: one for one in places}
        missing = [name for name in self.sites if name not in known]
        if missing:
            raise Refused(
                f"factors were learned for {missing[0]} of {self.model}, which {fused.model} does "
                "not have or does not fuse."
            )
        for name, one in self.sites.items():
            door.set(known[name].module, FACTORS, one.networks)
        for number, site in enumerate(fused.sites):
            mine = [self.sites[name] for name in site.names if name in self.sites]
            if mine:
                worst = max(one.output_held for one in mine)
                form = (
                    f"approximate: rank {self.rank} for {len(mine)} of {len(site.names)}, attention"
                    f" off by up to {worst:.0e} of its largest value"
                )
                fused.sites[number] = replace(site, form=form)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        out = io.StringIO()
        console = Console(file=out, width=118, color_system=None)
        console.print(
            f"{self.model}: pair biases of rank {self.rank} for {len(self.sites)} modules"
        )
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        heads = ("module", "kept in the fit", "kept held out", "best of the rank", "output off by")
        for head in heads:
            table.add_column(head)
        for name, one in self.sites.items():
            table.add_row(
                name or "(the model)",
                f"{one.kept:.1%}",
                f"{one.kept_held:.1%}",
                f"{one.best_held:.1%}",
                f"{one.output_held:.1e}",
            )
        console.print(table)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def learn(
    model: nn.Module,
    data: Sequence[Mapping[str, Any] | Sequence[Any]],
    *,
    rank: int,
    route: str = "svd",
    modules: str = "",
    steps: int = 2000,
    hidden: int = 256,
    seed: int = 0,
    quiet: bool = False,
) -> Factors:
    r"""What stands for the pair bias of triangle attention with a lower rank, and what that loses.

    .. math:: w_h \cdot \mathrm{LN}(z)_{jk} \approx \phi_q(x_j)_h \cdot \phi_k(x_k)_h

    Two routes: ``"svd"`` finds the factors anew at each call, by a truncated singular value
    decomposition of the bias itself, and needs no fit; ``"networks"`` are functions of features
    of the tokens (the means of a token's row and column of normed pairs, and its own pair), fitted
    by `fit_factors` to what the model's own code makes of the data. What is lost is measured on the
    last of the data, which takes no part in the fit where there are two or more, and printed.

    It is an **approximation**, and on the CPU no faster one: the exact pair bias is read once by
    the compiled loop (measured at 256 residues: 0.29 s of one triangle attention exactly, 0.45 s
    at rank 16, 0.50 s by its own code). The model keeps its weights; `fuse` with ``factors=`` uses
    it where no gradients are recorded. With gradients the exact bias is taken.

    Source: Wu et al., "FlashBias: Fast Computation of Attention with Bias", 2025, arXiv 2505.12044,
    its neural route for AlphaFold 3's Pairformer. Departures: the singular route by default, which
    keeps more at the same rank; features come from the module's own pairs alone (the work adds the
    inputs of the tokens), and the networks are not tuned further with the model.

    Args:
        model: with triangle attention that `fuse` knows; it must not be fused.
        data: calls of the model, each a dict of keyword arguments or a sequence of positional ones,
            without padding.
        rank: columns of the factors; more than twice the head size plus 16 gives tiles in place of
            wider queries and keys.
        route: "svd" or "networks".
        modules: regular expression that names must hold; by default all. The work replaces its
            first 16 blocks.
        steps, hidden, seed: of `fit_factors`.
        quiet: do not print the table.

    Returns:
        `Factors`, for ``ab.fuse(model, factors=...)``; ``str`` is the table.
    """
    from attnbias.fit import fit_factors

    root = unwrap(model)
    wanted = {
        place: family
        for place, family in find(root).places.items()
        if isinstance(family, TriangleFamily) and re.search(modules, place.name)
    }
    if not wanted:
        raise Refused(
            f"{type(root).__name__} holds no triangle attention"
            + (f" whose name has {modules!r}." if modules else ".")
        )
    if not data:
        raise AttnbiasError("learn needs at least one call of the model in data, got none.")
    if route not in ("svd", "networks"):
        raise AttnbiasError(f"route must be 'svd' or 'networks', got {route!r}.")
    if rank < 1:
        raise AttnbiasError(f"rank must be at least 1, got {rank}.")
    seen = _collect(root, wanted, data)
    sites = {}
    for place in wanted:
        mine = seen[place.name]
        if route == "svd":
            sites[place.name] = _judged(Truncation(rank), None, mine[-1], rank)
            continue
        fitted, held = (mine[:-1], mine[-1]) if len(mine) > 1 else (mine, mine[0])
        short = min(one.features.shape[0] for one in fitted)
        features = torch.stack([one.features[:short] for one in fitted])
        entries = torch.cat([one.entries[:, :, :short, :short] for one in fitted])
        found = fit_factors(
            Dense(entries), features, features, rank=rank, steps=steps, hidden=hidden, seed=seed,
            progress=False,
        )  # fmt: skip
        assert found.networks is not None
        networks = found.networks.eval().requires_grad_(False)
        sites[place.name] = _judged(networks, found.energy, held, rank)
    factors = Factors(type(root).__name__, rank, sites)
    if not quiet:
        print(factors)
    return factors


@dataclass(frozen=True)
class _Seen:
    """Of one call of one module: features (N, F), entries (1, heads, N, N), and the queries, keys
    and values of a few rows with their scale.
    """

    features: Tensor
    entries: Tensor
    rows: tuple[Tensor, Tensor, Tensor]
    scale: float


def _collect(
    root: nn.Module,
    wanted: Mapping[Place, Any],
    data: Sequence[Mapping[str, Any] | Sequence[Any]],
) -> dict[str, list[_Seen]]:
    seen: dict[str, list[_Seen]] = {place.name: [] for place in wanted}

    def listening(place: Place, family: TriangleFamily) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            z = args[0] if args else kwargs.get("x", kwargs.get("z"))
            mask = args[1] if len(args) > 1 else kwargs.get("mask")
            if mask is not None and not bool((mask == 1).all()):
                raise AttnbiasError("learn takes data without padding: one protein at a time.")
            parts = family.triangle_of(module)
            z = (z.transpose(1, 2) if parts.ending else z).detach()
            for one in z:
                x, heads = parts.norm(one[:SAMPLE]), parts.heads
                made = tuple(heads.split(f(x)) for f in (heads.query, heads.key, heads.value))
                seen[place.name].append(
                    _Seen(
                        pair_features(one, parts.norm).float(),
                        pair_bias(one[None], parts.norm, parts.to_bias).float(),
                        (made[0].float(), made[1].float(), made[2].float()),
                        heads.scale,
                    )
                )

        return hook

    handles = [
        place.module.register_forward_pre_hook(listening(place, family), with_kwargs=True)
        for place, family in wanted.items()
    ]
    try:
        with evaluating(root), torch.no_grad():
            for call in data:
                root(**call) if isinstance(call, Mapping) else root(*call)
    finally:
        for handle in handles:
            handle.remove()
    for name, calls in seen.items():
        if not calls:
            raise Refused(f"{name} was never called with these data.")
    return seen


def _judged(networks: nn.Module, kept: float | None, held: _Seen, rank: int) -> Learned:
    """What stands for a bias, with what it loses on a protein."""
    with torch.no_grad():
        single = isinstance(networks, Truncation)
        given = (held.entries,) if single else (held.features, held.features)
        made: Bias = networks(*given)
        total = held.entries.square().sum()
        lost = (made.dense() - held.entries).square().sum()
        values = torch.linalg.svdvals(held.entries).square()
        query, key, value = held.rows
        outs = [
            attention(query, key, value, bias=bias, scale=held.scale)
            for bias in (Dense(held.entries), made)
        ]
        wanted, found = (one for one in outs if isinstance(one, Tensor))
        off = (found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)
    share = float(1 - lost / total) if total else 1.0
    best = float(values[..., :rank].sum() / values.sum()) if total else 1.0
    return Learned(networks, share if kept is None else kept, share, float(off), best)
