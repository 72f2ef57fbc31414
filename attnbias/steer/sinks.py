"""The search behind `VAR.fit`: dimensions in which the first token's states are massive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.steer.hidden import HiddenCall
from attnbias.steer.rules.var import VAR, SinkFit, normalised
from attnbias.steer.scoring import bar
from attnbias.steer.spans import FIRST
from attnbias.steer.states import collect, tower_of


def find(
    rule: VAR,
    model: nn.Module,
    prompts: Sequence[Mapping[str, Any]],
    count: int,
    progress: bool,
) -> VAR:
    """See `VAR.fit`."""
    kept = list(prompts) if isinstance(prompts, Sequence) else []
    if not kept or not all(isinstance(one, Mapping) for one in kept):
        raise AttnbiasError(
            "fit needs prompts: a list of model inputs such as ab.prompt(...).inputs, got "
            f"{type(prompts).__name__ if not kept else type(kept[0]).__name__}."
        )
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise AttnbiasError(f"count must be a whole number above 0, got {count!r}.")
    tower = tower_of(rule, model)
    first, others = [], []
    with bar(len(kept), progress, "VAR") as tick:
        for inputs in kept:
            # The state after a layer is the input of the next.
            states = collect(model, inputs, at="layer", tower=tower, keep=_sizes)
            last = max(one.site.layer for one in states)
            for one in states:
                if one.site.layer < last and rule.acts_in(tower, one.site.layer + 1, "prefill"):
                    first.append(one.hidden[:, 0])
                    others.append(one.hidden[:, 1])
            tick()
    if not first:
        raise AttnbiasError("VAR acts at no layer that the model calls: check layers and start.")
    score, typical = (torch.cat(part).double().mean(0) for part in (first, others))
    good = (score > rule.tau) & (typical <= rule.tau)
    order = score.masked_fill(~good, -1.0).argsort(descending=True)
    dims = [int(d) for d in order[:count] if bool(good[d])]
    if not dims:
        best = int(score.masked_fill(typical > rule.tau, -1.0).argmax())
        raise AttnbiasError(
            f"no dimension of the first token is above tau={rule.tau:g} times the root mean square:"
            f" the largest is {best} with {float(score[best]):.3g}; give a smaller tau if that is "
            "a sink in this model."
        )
    left = score.clone()
    left[dims] = 0.0
    record = SinkFit(
        prompts=len(kept),
        scores=tuple(float(score[d]) for d in dims),
        others=tuple(float(typical[d]) for d in dims),
        next_best=float(left.max()),
    )
    return replace(rule, dims=tuple(dims), fitted=record)


def _sizes(site: HiddenCall, hidden: Tensor) -> Tensor:
    """Normalised activations of the first and of the median real token: ``(batch, 2, size)``."""
    sizes = normalised(hidden)
    real = (site.positions >= 0).expand(hidden.shape[0], -1)
    first = site.where((FIRST,)).expand(hidden.shape[0], -1)
    rows = [
        torch.stack([sizes[n, first[n]][0], sizes[n, real[n]].median(0).values])
        for n in range(hidden.shape[0])
    ]
    return torch.stack(rows)
