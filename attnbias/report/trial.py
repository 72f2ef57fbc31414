"""What of a text can be measured, tried out on its first tokens; how long the whole will take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.hub.modes import evaluating
from attnbias.report.kinds import MOST_LINES, candidates

LONG = 2048  # tokens from which on the time is told before
FUSED_ONLY = 8192
TRIAL = 12


def usable(model: nn.Module, ids: Tensor, layers: Any) -> list[Any]:
    """The statistics without arguments that apply, tried out on the first few tokens."""
    from attnbias.observe import observe
    from attnbias.observe.statistic import Statistic

    short = ids[:, :TRIAL]
    found = []
    for one in candidates():
        if ids.shape[1] > FUSED_ONLY and type(one).plan is Statistic.plan and not swept(one):
            continue
        try:
            with (
                evaluating(model),
                torch.no_grad(),
                observe(model, [one], spans=last(short), layers=layers) as s,
            ):
                model(input_ids=short, attention_mask=torch.ones_like(short))
        except AttnbiasError:
            if type(one).name in ("received", "entropy", "distance", "first_token"):
                raise  # those apply to every text: the model is what cannot be observed
            continue
        table = s.table()
        lines = {row.statistic for row in table}
        if len(lines) <= MOST_LINES and any(row.value == row.value for row in table):
            found.append(one)
    return found


def swept(statistic: Any) -> bool:
    """Whether the compiled sweep over the map finds what the statistic asks."""
    from attnbias import native

    return bool(statistic.swept) and native.available()


def tell_time(measured: Callable[[Tensor], object], ids: Tensor) -> None:
    """Say on standard error how long the three measurements will take."""
    from rich.console import Console

    from attnbias.observe.corpus.estimate import estimate, spoken

    found = estimate(measured, ids)
    seconds = spoken(3 * found.seconds(ids.shape[1]))
    console = Console(stderr=True, highlight=False)
    console.print(f"{ids.shape[1]:,} tokens, and two controls of the same length: {seconds}")


def last(ids: Tensor) -> dict[str, tuple[int, int]]:
    return {"last": (ids.shape[1] - 1, ids.shape[1])}
