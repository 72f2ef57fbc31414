"""One module beside its own code: does it give the same, and what does it gain?"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from attnbias.fuse import modes
from attnbias.fuse.door import Door
from attnbias.fuse.family import Family, Place
from attnbias.hub.modes import evaluating

BATCH, LENGTH = 2, 72  # of the check: long enough for the compiled loops, which have a least size
ROUNDS = 3
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class Gain:
    """Seconds of one module's forward: `stock` and `fused`, at `batch` and `length`.

    lowering: how `attention` computed it there; empty where the module took its own code.
    """

    batch: int
    length: int
    stock: float
    fused: float
    lowering: str = ""

    @property
    def ratio(self) -> float:
        """How many times faster the fused route is."""
        return self.stock / self.fused


def _call(place: Place, family: Family, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    args, kwargs = family.example(place, batch, length, generator)
    return family.output(place.module(*args, **kwargs)).detach()


def differs(place: Place, family: Family, door: Door) -> tuple[str, float, tuple[str, str]]:
    """Why a module may not be fused ("" where it may), by how much it differs, and what ran.

    `door` fuses this one module; it is closed again after.
    """
    with evaluating(place.module), torch.no_grad():
        wanted = _call(place, family, BATCH, LENGTH)
        door.open()
        try:
            with modes.taking("fused"), modes.recording() as seen:
                found = _call(place, family, BATCH, LENGTH)
        finally:
            door.close()
    if not seen:
        return "its attention does not reach us.", 0.0, ("", "")
    if wanted.shape != found.shape:
        return f"output {tuple(found.shape)} in place of {tuple(wanted.shape)}.", 0.0, seen[0]
    difference = _apart(found, wanted)
    if not difference <= _TOLERANCE[wanted.dtype]:
        return (
            f"it computes more than its family's bias: on random input its output differs by "
            f"{difference:.1e}.",
            difference,
            seen[0],
        )
    return "", difference, seen[0]


def _apart(found: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest value; in half formats, where the stock code itself
    rounds single weights, that of the root mean squares.
    """
    off, size = (found - wanted).double(), wanted.double()
    if wanted.dtype in (torch.bfloat16, torch.float16):
        return float(off.norm() / size.norm().clamp_min(1e-30))
    return float(off.abs().max() / size.abs().max().clamp_min(1e-30))


def measured(place: Place, family: Family, door: Door, batch: int, length: int) -> Gain:
    """Time of both routes by turns, the median of a few rounds; each decides by size as ever."""
    times: dict[str, list[float]] = {"stock": [], "fused": []}
    length = length if family.longest is None else min(length, family.longest)
    with evaluating(place.module), torch.no_grad(), modes.recording() as seen:
        for number in range(ROUNDS + 1):
            for which in ("stock", "fused"):
                if which == "fused":
                    door.open()
                try:
                    generator = torch.Generator().manual_seed(0)
                    args, kwargs = family.example(place, batch, length, generator)
                    start = time.perf_counter()
                    place.module(*args, **kwargs)
                    if number:  # the first round warms up
                        times[which].append(time.perf_counter() - start)
                finally:
                    door.close()
    stock, fused = (statistics.median(times[which]) for which in ("stock", "fused"))
    return Gain(batch, length, stock, fused, seen[-1][1] if seen else "")
