"""Shares of attention: how new shares become an edit, and how that edit is computed fast.

A reallocation is the bias ``log(new / old)[i, g(j)]``. It has rank G, so it rides along as G more
columns of query and key: the fused operator then computes it with no mask of its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnbias.bias import Bucketed
from attnbias.errors import AttnbiasError
from attnbias.steer.placing import gather, numbers

if TYPE_CHECKING:
    from attnbias.hub import Call
    from attnbias.steer.edit import Edit

TOLERANCE = 1e-4  # how far returned shares may miss the total of their row
SMALL = 4096  # shares up to which they are checked outside of PyTorch
# Below this a share has lost its digits (float32 ends at 1e-38), and counts as none.
NO_MASS = {torch.float32: 1e-30, torch.float64: 1e-290}


@dataclass(frozen=True)
class Fold:
    """One reallocation: the table ``(batch, heads, queries, groups)``, the groups, the heads."""

    table: Tensor
    groups: Tensor
    heads: tuple[int, ...]

    def bias(self) -> Bucketed:
        """The same as a bias on its own heads."""
        return Bucketed(self.table, None, self.groups)

    def apply(
        self, query: Tensor, key: Tensor, value: Tensor, heads: Sequence[int], scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Append the table to the queries of `heads` and the one-hot groups to the keys.

        A half-precision query takes the table in three parts, whose sum has 24 bits: the operator
        adds products in float32.
        """
        index = tuple(self.heads.index(head) if head in self.heads else -1 for head in heads)
        # Minus infinity times the 0 of another group would be NaN; this is as good as that.
        hidden = -3e4 if query.dtype == torch.float16 else -1e30
        table = gather(self.table, index) / scale
        rest = torch.where(table == -torch.inf, hidden, table)
        parts = [rest.to(query.dtype)]
        if query.dtype in (torch.float16, torch.bfloat16):
            for _ in range(2):
                rest = rest - parts[-1].to(rest.dtype)
                parts.append(rest.to(query.dtype))
        groups = gather(self.groups, index, fill=False)
        columns = torch.nn.functional.one_hot(groups.long(), self.table.shape[-1]).to(key.dtype)
        if groups.shape[1] > 1:
            key, value = (repeat(t, len(heads)) for t in (key, value))
        columns = columns.expand(key.shape[0], key.shape[1], -1, -1)
        return torch.cat([query, *parts], -1), torch.cat([key] + [columns] * len(parts), -1), value


def repeat(tensor: Tensor, heads: int) -> Tensor:
    """Grouped keys or values, one per query head."""
    count = tensor.shape[1]
    return tensor if count == heads else tensor.repeat_interleave(heads // count, 1)


@functools.lru_cache(maxsize=1024)
def owners(heads: tuple[int, ...], group: int) -> tuple[int, ...]:
    """The key heads of some query heads: each once where all have as many of them, else one for
    each query head.
    """
    counts: dict[int, int] = {}
    for head in heads:
        counts[head // group] = counts.get(head // group, 0) + 1
    even = len(set(counts.values())) == 1
    return tuple(sorted(counts) if even else [head // group for head in heads])


def query_on(call: Call | Edit, heads: Sequence[int]) -> Tensor:
    """Queries of some query heads."""
    query = call.query
    if tuple(heads) == tuple(range(query.shape[1])):
        return query
    return query.index_select(1, numbers(tuple(heads), query.device))


def owned(call: Call | Edit, tensor: Tensor, heads: Sequence[int]) -> Tensor:
    """Keys or values of some query heads; grouped ones are not repeated where the choice allows."""
    total = call.query.shape[1]
    if tuple(heads) == tuple(range(total)):
        return tensor
    index = owners(tuple(heads), total // tensor.shape[1])
    return tensor.index_select(1, numbers(index, tensor.device))


def on_heads(call: Call | Edit, heads: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of some query heads."""
    key, value = (owned(call, tensor, heads) for tensor in (call.key, call.value))
    return query_on(call, heads), key, value


def log_ratio(old: Tensor, new: Tensor, name: str) -> Tensor:
    """``log(new / old)``, the bias that turns old shares into new ones; 0 where nothing changes.

    The total of a row stays as it is, so the model's sink logit and the normalisation stay too.

    Raises:
        AttnbiasError: a share that is negative or not finite, a row with another total, or a share
            for a group that has no mass (none of its keys is visible there).
    """
    with torch.no_grad():
        if not _sound(old, new):
            _refuse(old, new, (new.sum(-1) - old.sum(-1)).abs(), name)
    # Logarithms first: the ratio itself may overflow. Equal shares give exactly 0.
    if not (torch.is_grad_enabled() and (old.requires_grad or new.requires_grad)):
        return (new.log() - old.log()).masked_fill_(old <= 0, 0.0)
    some = torch.where(old > 0, new, 1.0)
    log_new = torch.where(some > 0, torch.where(some > 0, some, 1.0).log(), -torch.inf)
    return log_new - torch.where(old > 0, old, 1.0).log()


def _sound(old: Tensor, new: Tensor) -> bool:
    """Whether shares are what a rule may return."""
    a: Any = old
    b: Any = new
    if new.numel() <= SMALL and new.device.type == old.device.type == "cpu":
        # A decoded token has few shares: NumPy is at them sooner than twelve operators.
        a, b = old.detach().numpy(), new.detach().numpy()
    good = (b >= 0) & ((a > 0) | (b <= 0)) & (b < math.inf)
    return bool(good.all() and (abs(b.sum(-1) - a.sum(-1)) <= TOLERANCE).all())


def _refuse(old: Tensor, new: Tensor, miss: Tensor, name: str) -> None:
    """Say what is wrong with shares."""
    if not bool(torch.isfinite(new).all()) or bool((new < 0).any()):
        raise AttnbiasError(f"{name}.reallocate returned a share below 0 or not finite.")
    if bool(((new > 0) & (old <= 0)).any()):
        raise AttnbiasError(
            f"{name}.reallocate gives attention to a group that has none: a group whose keys "
            "are all hidden from a query cannot receive; return such rows unchanged."
        )
    raise AttnbiasError(
        f"{name}.reallocate must keep the total of each row, got one that is off by "
        f"{float(miss.max()):.2g}."
    )
