"""From tensors to the arguments of the backward kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from attnbias.kernels import backward_configs, configs, points_configs
from attnbias.kernels.backward import Factors, Lines, deltas
from attnbias.kernels.backward_keys import keys_pass
from attnbias.kernels.backward_queries import queries_pass
from attnbias.kernels.backward_rows import rows_of_blocks
from attnbias.kernels.launch import LOG2E, Given, device_of, rows_of, steps

DELTA_ROWS = 64
PROGRAMS = 1024  # with sums over diagonals, where their lines fit: a few per multiprocessor
LINES = 2**22  # entries of all lines that are always allowed: 16 MB


@dataclass(frozen=True)
class Wanted:
    """Which gradients. line: ``(batch | 1, heads | 1)`` of the table of diagonals, or None.
    factors: those whose gradient is wanted, ``(batch | 1, heads | 1, length, power of two)``,
    float32, left and right; None if no gradient is. points_rows, points_cols: for each term what
    `points_gradients` calls WANTED, None if nothing is wanted of programs that own queries, or
    keys; slots: where those sums go.
    """

    query: bool = False
    key: bool = False
    value: bool = False
    row: bool = False
    line: tuple[int, int] | None = None
    factors: tuple[Tensor, Tensor] | None = None
    points_rows: tuple[int, ...] | None = None
    points_cols: tuple[int, ...] | None = None
    slots: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Found:
    """Gradients, None where not wanted.

    query, key, value: like the tensors. In float32: row ``(batch, heads, keys)``, the sums of the
    columns of the gradient of the scores; left ``(batch, heads, queries, rank)`` and right
    ``(batch, heads, keys, rank)``, of the factors; line ``(batch | 1, heads | 1, entries)``.
    """

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    row: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    line: Tensor | None = None


@dataclass(frozen=True)
class Work:
    """What every backward kernel reads, with contiguous rows."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor
    lse: Tensor
    delta: Tensor
    scale: float
    given: Given

    @staticmethod
    def of(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        grad: Tensor | None,
        grad_lse: Tensor | None,
        scale: float,
        given: Given,
    ) -> Work:
        """grad, grad_lse: of the output and of the log-sum-exp, None is zero."""
        batch, heads, n, width = out.shape
        if grad is None:
            grad = out.new_zeros(1, 1, 1, width).expand(out.shape)
        query, key, value, out, grad = (
            rows_of(t.detach()) for t in (query, key, value, out, grad.to(query.dtype))
        )
        lse = lse.contiguous()
        delta = torch.empty_like(lse)
        kernel: Any = deltas
        with device_of(query):
            kernel[(triton.cdiv(n, DELTA_ROWS) * batch * heads,)](
                out,
                grad,
                lse,
                None if grad_lse is None else grad_lse.float().contiguous(),
                delta,
                steps(out),
                steps(grad),
                heads,
                n,
                width,
                LSE=grad_lse is not None,
                ROWS=DELTA_ROWS,
                WIDTH=configs.power(width),
            )
        return Work(query, key, value, grad, lse, delta, scale, given)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.query, self.key, self.value, self.grad, self.lse, self.delta

    def steps(self) -> tuple[tuple[int, int, int], ...]:
        return steps(self.query), steps(self.key), steps(self.value), steps(self.grad)

    @property
    def folds(self) -> bool:
        """Whether scores have nothing to add: their scale is that of the exponents."""
        return self.scale > 0.0 and not self.given.kinds and not self.given.rank

    def constants(self, config: configs.Config) -> dict[str, Any]:
        """What every kernel is compiled for; SIZE, WIDTH: powers of two."""
        given = self.given
        return {
            "KINDS": given.kinds,
            "RANK": given.rank,
            "BAND": given.band,
            "RANGES": given.ranges,
            "DROPS": given.drop is not None,
            "PRECISION": config.precision,
            "ROWS": config.rows,
            "COLS": config.cols,
            "SIZE": configs.power(self.query.shape[-1]),
            "WIDTH": configs.power(self.value.shape[-1]),
            **config.options(),
        }

    def halved(self, config: configs.Config, factors: Factors | None) -> dict[str, Any]:
        """`constants` with head sizes in two parts, and with the factors."""
        size, width = self.query.shape[-1], self.value.shape[-1]
        (one, more), (wide, wider) = configs.halves(size), configs.halves(width)
        half = self.query.dtype != torch.float32
        own = {
            "size": size,
            "width": width,
            "SIZE": one,
            "SIZE_MORE": more,
            "WIDTH": wide,
            "WIDTH_MORE": wider,
            "FACTORS": 0 if factors is None else factors.left.shape[-1],
            "FOLDS": self.folds,
            "CHUNK": config.chunk,
            "SPLITS": half,
        }
        return {**self.constants(config), **own}


def backward_pass(work: Work, wanted: Wanted) -> Found:
    """The gradients that are wanted; nothing may be empty."""
    keys, queries, factors = Found(), Found(), None
    if wanted.factors is not None:
        left, right = wanted.factors
        factors = Factors(left, _steps(left), right, _steps(right))
    some = wanted.factors is not None
    with device_of(work.query):
        if wanted.key or wanted.value or wanted.row or some or wanted.points_cols is not None:
            keys = _keys(work, wanted, factors)
        if wanted.query or some or wanted.line is not None or wanted.points_rows is not None:
            queries = _queries(work, wanted, factors)
    return Found(
        queries.query, keys.key, keys.value, keys.row, queries.left, keys.right, queries.line
    )


def query_blocks(work: Work, wanted: Wanted) -> int:
    """Blocks of queries: of each the sums for `points_gradients` are written."""
    return triton.cdiv(work.query.shape[2], _config(work, wanted).rows)


def _config(work: Work, wanted: Wanted) -> configs.Config:
    line = wanted.line is not None
    config = backward_configs.queries(
        work.query.dtype,
        work.query.shape[3],
        work.value.shape[3],
        work.given.rank,
        line,
        work.given.drop is not None,
    )
    sums = points_configs.row_sums(work.given.kinds, wanted.points_rows)
    return points_configs.fitting(config, work.given.kinds, sums, "both" if line else "rows")


def _keys(work: Work, wanted: Wanted, factors: Factors | None) -> Found:
    given, (batch, heads, n, size) = work.given, work.query.shape
    groups, m, width = work.value.shape[1:]
    dk = work.key.new_empty(batch, groups, m, size) if wanted.key else None
    dv = work.value.new_empty(batch, groups, m, width) if wanted.value else None
    row = work.lse.new_empty(batch, heads, m) if wanted.row else None
    right = None
    if factors is not None:
        right = work.lse.new_empty(batch, heads, m, factors.right.shape[-1])
    drops = given.drop is not None
    config = backward_configs.keys(work.query.dtype, size, width, given.rank, drops)
    sums = points_configs.col_sums(given.kinds, wanted.points_cols)
    config = points_configs.fitting(config, given.kinds, sums, "cols")
    kernel: Any = keys_pass
    kernel[(triton.cdiv(m, config.cols) * batch * groups,)](
        *work.tensors(),
        dk,
        dv,
        row,
        right,
        wanted.slots,
        *work.steps(),
        (0, 0, 0) if dk is None else steps(dk),
        (0, 0, 0) if dv is None else steps(dv),
        heads,
        heads // groups,
        n,
        m,
        work.scale,
        work.scale * LOG2E if work.folds else LOG2E,
        given.columns,
        factors,
        given.terms,
        given.places,
        rows_of_blocks(given, config.cols, m),
        given.drop,
        KEY=wanted.key,
        VALUE=wanted.value,
        ROW=wanted.row,
        POINTS=wanted.points_cols,
        **work.halved(config, factors),
    )
    return Found(key=dk, value=dv, row=row, right=right)


def _queries(work: Work, wanted: Wanted, factors: Factors | None) -> Found:
    given, (batch, heads, n, size) = work.given, work.query.shape
    groups, m = work.key.shape[1:3]
    dq = work.query.new_empty(batch, heads, n, size) if wanted.query else None
    left = None
    if factors is not None:
        left = work.lse.new_empty(batch, heads, n, factors.left.shape[-1])
    config = _config(work, wanted)
    blocks = query_blocks(work, wanted)
    line_batch, line_heads = (batch, heads) if wanted.line is None else wanted.line
    entries = line_batch * line_heads
    programs = blocks
    lines = None
    if wanted.line is not None:
        # As many lines as keep the card busy, but no more memory than query and key take.
        allowed = max(LINES, (work.query.numel() + work.key.numel()) // 2) // (n + m - 1)
        items = batch * heads // entries * blocks
        programs = max(1, min(items, triton.cdiv(PROGRAMS, entries), allowed // entries))
        lines = work.lse.new_zeros(entries, programs, n + m - 1)
    kernel: Any = queries_pass
    kernel[(entries * programs,)](
        *work.tensors(),
        dq,
        left,
        Lines(work.delta if lines is None else lines, line_batch, line_heads),
        wanted.slots,
        *work.steps(),
        (0, 0, 0) if dq is None else steps(dq),
        batch,
        heads,
        heads // groups,
        n,
        m,
        work.scale,
        work.scale * LOG2E if work.folds else LOG2E,
        programs,
        given.columns,
        factors,
        given.terms,
        given.places,
        given.drop,
        QUERY=wanted.query,
        LINE=lines is not None,
        POINTS=wanted.points_rows,
        **work.halved(config, factors),
    )
    line = None if lines is None else lines.sum(1).view(line_batch, line_heads, -1)
    return Found(query=dq, left=left, line=line)


def _steps(tensor: Tensor) -> tuple[int, int, int]:
    """Steps of batch, head and row, 0 where there is one for all."""
    made = tuple(0 if n == 1 else s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return made[0], made[1], made[2]


__all__ = ["Found", "Wanted", "Work", "backward_pass", "query_blocks"]
