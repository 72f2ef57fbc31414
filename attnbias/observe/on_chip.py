"""One sweep over the map on a GPU: all that the statistics of a call need, in one kernel.

What `attnbias.observe.sweep` is to a CPU. A tile of scores is made on chip with everything that is
added to it (see `attnbias.kernels`), so that any bias that a kernel can make is swept, and nothing
of the size of the map is written. Exact: a model in a half format is read as it is, since products
of two such numbers are exact in float32. Two runs agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnbias import kernels

if TYPE_CHECKING:
    from attnbias.observe.scene import Scene

WIDEST = 256  # features of a head, as in the lowering

_slow = False


@contextmanager
def interpreted() -> Iterator[None]:
    """Inside, kernels that run interpreted (``TRITON_INTERPRET=1``) are taken, too: for tests."""
    global _slow
    before, _slow = _slow, True
    try:
        yield
    finally:
        _slow = before


def fits(scene: Scene) -> bool:
    """Whether the kernel takes this call."""
    if kernels.runs_on(scene.device) or (kernels.interpreted() and not _slow):
        return False
    if scene.query.dtype != torch.float32 or scene.width > WIDEST:
        return False
    from attnbias.lowering import triton_parts

    return not triton_parts.reason(scene.bias)


class OnChip:
    """The sums of one call. Everything is (B, H, N) or (B, H, M).

    Attributes:
        columns: attention received, float64. inner: ``sum p (lse - s)``, the entropy of each row.
        gap: mean distance in positions. peak, place: (B, H, N, top), the largest weights and their
            key slots, largest first; slot -1 where no key is left.
        features: (B, H, N, F), the sums of ``p_ij f_j`` for `features` (B, M, F).
    """

    def __init__(
        self, scene: Scene, wanted: set[str], features: Tensor | None = None, top: int = 1
    ) -> None:
        from attnbias.kernels.statistics_pass import Wanted, log_sum_exp, statistics_pass
        from attnbias.lowering import triton_parts
        from attnbias.lowering.problem import Problem

        query, key = tensors(scene)
        problem = Problem(query, key, key, scene.bias, scene.scale)
        given = triton_parts.give(problem, scene.bias)
        if not scene.lse_known:
            scene.set_lse(scene.with_sink(log_sum_exp(query, key, scene.scale, given)))
        asked = Wanted(
            received="columns" in wanted,
            inner="inner" in wanted,
            gap="gap" in wanted,
            top=top if "peak" in wanted else 0,
            features=features,
            query_positions=scene.query_positions,
            key_positions=scene.key_positions,
        )
        lse = torch.where(scene.counted, scene.lse, torch.inf)
        found = statistics_pass(query, key, lse, scene.scale, given, asked)
        self.columns, self.inner, self.gap = found.received, found.inner, found.gap
        self.peak, self.place, self.features = found.weight, found.place, found.means


def tensors(scene: Scene) -> tuple[Tensor, Tensor]:
    """Queries and keys as the kernel reads them: in the model's own half format, or in float32."""
    query, key = scene.given
    half = query.dtype == key.dtype and query.dtype in (torch.float16, torch.bfloat16)
    return (query, key) if half else (scene.query, scene.key)
