"""Whether a layer really computes the attention that a call describes.

Model files have eager functions of their own, and some add what the arguments do not show. The
description is checked once per layer and context on three queries; who differs is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from attnbias.hub.call import Call

# What rounding explains, relative to the largest value. Half precision is looser than it seems:
# eager attention rounds its scores, and a score of 100 in bfloat16 is off by up to 0.25.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 0.3}
_PER_SCORE = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}


def probed(queries: int) -> list[int]:
    """The queries that are checked where not all are: the first, the middle and the last."""
    return sorted({0, queries // 2, queries - 1}) if queries else []


def difference(call: Call, rows: Iterable[int]) -> str:
    """Why the stock output is not the attention that `call` describes; empty if it is.

    Computed in float32 (float64 in float64) from `query`, `key`, `value`, `bias`, `scale` and
    `sink` for the given queries, O(rows x keys). Rows without a visible key are left out: models
    do not define them.
    """
    if call.training and call.dropout > 0:
        return ""
    with torch.no_grad():  # also so that checkpointing saves the same tensors when it recomputes
        rows = list(rows)
        output = call.plain_at(rows)
        wanted = (call.query.shape[0], len(rows), call.query.shape[1], call.value.shape[-1])
        if tuple(output.shape) != wanted:
            return f"{call.site} returns shape {tuple(output.shape)}, expected {wanted}."
        for number, row in enumerate(rows):
            if not _fits(call, row, output[:, number]):
                return (
                    f"{call.site} computes more than softmax(scale * q.k + bias) times the values; "
                    "it can be neither observed nor steered."
                )
    return ""


def _fits(call: Call, row: int, output: Tensor) -> bool:
    kind = torch.float64 if call.query.dtype == torch.float64 else torch.float32
    batch, heads, _, width = call.query.shape
    key, value = call.key.to(kind), call.value.to(kind)  # copies nothing in float32
    # Grouped heads share a key head: they stand where the queries would.
    query = call.query[:, :, row].to(kind).reshape(batch, key.shape[1], -1, width)
    scores = (query @ key.transpose(-1, -2)).reshape(batch, heads, 1, -1) * call.described_scale()
    if call.bias is not None:
        scores = scores + call.bias[..., row : row + 1, :].dense().to(scores)
    if call.sink is not None:
        sink = call.sink.to(scores).reshape(1, -1, 1, 1).expand(batch, heads, 1, 1)
        scores = torch.cat([scores, sink], -1)
    seen = (scores > -torch.inf).any(-1)[..., 0]
    if not bool(seen.any()):
        return True
    weights = torch.softmax(scores, -1)[..., : key.shape[2]]
    grouped = weights.reshape(batch, key.shape[1], -1, key.shape[2])
    wanted = (grouped @ value).reshape(batch, heads, -1)
    error = (wanted - output.to(kind)).abs().amax(-1)[seen]
    finite = scores[scores > -torch.inf]
    relative = _TOLERANCE.get(output.dtype, 1e-3)
    relative += _PER_SCORE.get(output.dtype, 1e-6) * float(finite.abs().max())
    bound = relative * (float(value.abs().max()) + 1e-6)
    # Overflow of the model's own (half precision) is not for us to judge: NaN exceeds nothing.
    return not bool((error > bound).any())
