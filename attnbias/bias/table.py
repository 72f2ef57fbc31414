"""A smooth function of a distance as a table, with the error that it makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST, MOST = 512, 32768  # intervals


@dataclass(frozen=True)
class Table:
    """Values ``(heads, intervals + 1)`` at even nodes from `low`; linear in between.

    error: twice the largest difference to the function at the quarters of the intervals.
    """

    values: Tensor
    nodes: Tensor
    low: float
    per_unit: float  # intervals per unit of distance
    error: float


@torch.no_grad()
def tabulate(
    function: Callable[[Tensor], Tensor],
    low: float,
    high: float,
    error: float,
    kind: torch.dtype,
    device: torch.device | None = None,
) -> Table | None:
    """The coarsest table that keeps to the error; None where even the finest does not.

    `function`: distances ``(count)`` to values ``(heads, count)``.
    """
    if not high > low:
        high = low + 1.0
    intervals = LEAST
    while intervals <= MOST:
        # Made on the CPU: the same nodes for every device.
        quarters = torch.linspace(low, high, 4 * intervals + 1, dtype=torch.float64)
        quarters = quarters.to(device, kind)
        values = function(quarters).detach()
        if not bool(values.isfinite().all()):
            return None
        nodes = values[:, ::4]
        rise = nodes[:, 1:] - nodes[:, :-1]
        found = max(
            float((values[:, k::4] - nodes[:, :-1] - rise * (k / 4)).abs().max()) for k in (1, 2, 3)
        )
        if 2 * found <= error:
            return Table(
                nodes.contiguous(), quarters[::4].clone(), low, intervals / (high - low), 2 * found
            )
        intervals *= 2
    return None
