"""CMR, a model of free recall in which context drifts along a list, and its fit to heads."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from attnbias.errors import AttnbiasError

REACH = 8  # lags that a curve is normalised over, on each side


@dataclass(frozen=True)
class CMR:
    r"""The CMR model of free recall over a grid of parameters, and its distance to lag profiles.

    A list of items is bound to a context that drifts; recall of item s starts from its context:

    .. math:: M_{ij} = (1 - \beta_{enc})^{j-i-1}\ (j > i), \qquad p(j) \propto (M^\top t)_j

    .. math:: t_{in} \propto (1 - \gamma) e_s + \gamma M e_s, \qquad
        t \leftarrow \mathrm{unit}\!\left((1 - \beta_{rec})\, t + \beta_{rec}\, t_{in}\right)

    until the state after the last item is drawn. The curve is the probability of each lag between
    items recalled one after the other. Curves are simulated, and kept for as long as the program
    runs.

    Args:
        betas, gammas: steps of the grid: beta_enc in 1/betas .. 1, beta_rec in 0 .. 1 by the same
            step, gamma in 0 .. 1. Published 20 and 10.
        items: in the list; published 100. starts: the first this many items start as many recalls;
            published 20. recalls: of each; published 1,000. longest: items recalled at most; 100.
        seed: of the simulation.

    Cost: about 20 ms a point of the grid with the defaults here (660 points); the published grid
    and recalls take days.

    Source: Linking In-context Learning in Transformers to Human Episodic Memory, 2024 (arXiv
    2405.14992); authors' code read. Departs: two corners of the grid have closed forms there and
    are simulated here as all others.
    """

    betas: int = 10
    gammas: int = 5
    items: int = 100
    starts: int = 10
    recalls: int = 20
    longest: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for word, least in (
            ("betas", 1),
            ("gammas", 1),
            ("items", 2 * REACH),
            ("starts", 1),
            ("recalls", 1),
            ("longest", 1),
        ):
            value = getattr(self, word)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise AttnbiasError(f"CMR({word}) must be a whole number from {least}.")

    @property
    def grid(self) -> Tensor:
        """``(points, 3)``: beta_enc, beta_rec, gamma."""
        step = torch.arange(self.betas + 1, dtype=torch.float64) / self.betas
        gamma = torch.arange(self.gammas + 1, dtype=torch.float64) / self.gammas
        return torch.cartesian_prod(step[1:], step, gamma)

    def curve(self, beta_enc: float, beta_rec: float, gamma: float) -> Tensor:
        """``(17,)``: the probability of each lag from -8 to 8, which sum to 1."""
        place = torch.arange(self.items + 1, dtype=torch.float32)
        far = place[None] - place[:-1, None] - 1
        bound = torch.where(far >= 0, (1 - beta_enc) ** far.clamp_min(0), 0.0)
        incoming = (1 - gamma) * torch.eye(self.items) + gamma * bound[:, :-1].T
        incoming = torch.nn.functional.normalize(incoming, dim=1)  # by item, a row each
        walks = self.starts * self.recalls
        last = torch.arange(self.starts).repeat_interleave(self.recalls)
        context = torch.nn.functional.one_hot(last, self.items).float()
        counts, made = torch.zeros(walks, 2 * REACH + 1), torch.zeros(walks)
        runs = torch.arange(walks)  # recalls that go on
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.longest):
            chance = (context @ bound).cumsum(1)
            draw = torch.rand(len(runs), 1, generator=generator) * chance[:, -1:]
            item = (chance < draw).sum(1).clamp_max(self.items)
            go = item < self.items
            runs, item, last, context = runs[go], item[go], last[go], context[go]
            if len(runs) == 0:
                break
            lag = item - last
            near = lag.abs() <= REACH
            made[runs] += 1
            counts[runs[near], lag[near] + REACH] += 1
            context = (1 - beta_rec) * context + beta_rec * incoming[item]
            context = torch.nn.functional.normalize(context, dim=1)
            last = item
        share = (counts / made[:, None]).reshape(self.starts, self.recalls, -1).nanmean(1)
        return (share / share.sum(1, keepdim=True)).nanmean(0).double()

    def curves(self) -> Tensor:
        """``(points, 17)``: the curve of every point of `grid`."""
        return _curves(self)

    def distance(self, profile: Tensor) -> tuple[Tensor, Tensor]:
        r"""The CMR distance of a lag profile, and the point of the grid that fits it best.

        .. math:: d = \min_\theta \frac{\operatorname{mean}_l (\hat c_l - \hat a_l)^2}
            {\operatorname{var}_l \hat a_l}, \qquad \hat a = a - \min a,\quad
            \hat c = \frac{\max \hat a}{\max (c - \min c)} (c - \min c)

        Args:
            profile: ``(..., lags)`` attention by lag from -5 to 5 (or others, 8 a side at most).

        Returns:
            ``(...)`` and ``(..., 3)``: the distance and (beta_enc, beta_rec, gamma); NaN for a
            profile that is the same at all lags, or not a number somewhere.
        """
        side = profile.shape[-1] // 2
        if profile.shape[-1] != 2 * side + 1 or not 1 <= side <= REACH:
            raise AttnbiasError(
                f"a profile has as many lags on each side, 1 to {REACH}, and lag 0; got "
                f"{profile.shape[-1]} lags."
            )
        own = self.curves()[:, REACH - side : REACH + side + 1]
        own = own - own.amin(1, keepdim=True)
        own = own / own.amax(1, keepdim=True)
        flat = profile.double().reshape(-1, profile.shape[-1])
        flat = flat - flat.amin(1, keepdim=True)
        error = (own[None] * flat.amax(1)[:, None, None] - flat[:, None]).square().mean(-1)
        error = error / flat.var(1, unbiased=False)[:, None]
        best = error.nan_to_num(torch.inf).argmin(1)
        found = error.gather(1, best[:, None])[:, 0]
        point = torch.where(found.isnan()[:, None], torch.nan, self.grid[best])
        return found.reshape(profile.shape[:-1]), point.reshape(*profile.shape[:-1], 3)


@functools.lru_cache(maxsize=4)
def _curves(model: CMR) -> Tensor:
    return torch.stack([model.curve(*point) for point in model.grid.tolist()])
