"""Any bias in one compiled loop, forward and backward: products and exponentials of a tile while it
is in the cache, the bias added on the way.

Windows, paddings and packed segments are ranges of keys that are never looked at outside; a table,
a row of keys and a matrix are read where they lie; a `LowRank` lies beside queries and keys. The
entries of every other structure are built in strips of rows that stay in the cache, and the
gradient of the scores comes back in such strips.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbias.bias import Bias
from attnbias.lowering import dropout, flash, own_parts, packed
from attnbias.lowering.nest import Buffers
from attnbias.lowering.own_parts import Parts
from attnbias.lowering.problem import Lowering, Offer, Problem, tile_cost
from attnbias.lowering.total import Total
from attnbias.native import available

SHORTEST = 64  # queries: below, making panels of the keys costs as much as using them
CHUNKS = 8  # of the keys at most, in the backward pass
START = 2e-4 / 2e-11  # seconds of a call, in features of scores (see `tile_cost`), on two cores


class Own(Lowering):
    """Softmax with every bias, dropout and gradients. Memory O(queries + keys), and strips of
    entries where a structure needs them built. In float32 whatever the format.
    """

    name = "own"
    drops = True

    def offer(self, problem: Problem) -> Offer:
        query = problem.query
        if not available() or query.device.type not in ("cpu", "meta"):
            return self.refuse("the compiled loops are not there")
        if query.dtype == torch.float64:
            return self.refuse("the compiled loops are for float32")
        if problem.bias is None and not problem.dropout:
            return self.refuse("there is no bias and no dropout")
        if problem.queries < SHORTEST:
            return self.refuse(f"fewer than {SHORTEST} queries do not pay for panels of keys")
        terms = [] if problem.bias is None else problem.bias.terms()
        built = any(not own_parts.direct(t) for t in terms)
        time = 0.8 + tile_cost(problem) if built else 0.55
        if torch.backends.cpu.get_cpu_capability() != "AVX512":
            time += 0.5  # PyTorch's own products are as wide as these
        work = problem.batch * problem.heads * problem.queries * problem.keys
        if not problem.empty:
            time = time * _share(problem) + START / (work * (query.shape[-1] + 12.0))
        rows = problem.batch * problem.heads * (problem.queries + problem.keys)
        memory = 4 * rows * query.shape[-1] + 4 * own_parts.ENTRIES * built
        return self.bid(round(time, 3), memory, "one compiled loop over blocks of queries")

    def answer(self, problem: Problem) -> Offer:
        # Gradients to the bias come out of the same loop.
        return self.offer(problem) if problem.normaliser == "softmax" else super().answer(problem)

    def run(self, problem: Problem) -> tuple[Tensor, Tensor]:
        if problem.empty or problem.value.shape[-1] == 0:
            return flash.flash(problem.query, problem.key, problem.value, scale=problem.scale)
        parameters = () if problem.bias is None else problem.bias.parameters()
        apply: Any = _Own.apply
        found: tuple[Tensor, Tensor] = apply(
            problem.query, problem.key, problem.value, problem, *parameters
        )
        return found


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, problem: Problem, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        bias = None if problem.bias is None else problem.bias.detach()
        ready = _Ready(problem, bias, query, key, value)
        out, lse = ready.forward()
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse, *parameters)
        nothing = query.new_empty(0)  # they are saved: another reference would be a cycle
        ctx.problem = dataclasses.replace(
            problem, query=nothing, key=nothing, value=nothing, bias=bias
        )
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, *parameters = ctx.saved_tensors
        problem = ctx.problem
        total = Total(problem.bias, parameters, ctx.needs_input_grad[4:])
        bias = None if total.bias is None else total.bias.detach()
        ready = _Ready(problem, bias, query, key, value)
        dq, dk, dv = ready.backward(out, lse, grad, grad_lse, total)
        wanted = ctx.needs_input_grad
        given = [t if w else None for t, w in zip((dq, dk, dv), wanted[:3], strict=True)]
        return (*given, None, *total.results())


def _share(problem: Problem) -> float:
    """Pairs that packed segments leave to be seen."""
    segments, _ = packed.split(problem)
    if len(segments) != 1 or segments[0].query_ids.is_meta or segments[0].key_ids.is_meta:
        return 1.0
    parts = packed.ranges(problem)
    if parts is None:
        return 1.0
    return packed.pairs(parts) / (problem.batch * problem.queries * problem.keys)


def rows_of(tensor: Tensor) -> Tensor:
    """In float32, with contiguous rows."""
    tensor = tensor.detach().float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def flat(tensor: Tensor | None, dims: int = 3) -> tuple[Tensor, tuple[int, ...]]:
    """The memory of a tensor from its first entry on, and its steps: 0 where its size is 1."""
    if tensor is None or tensor.numel() == 0:
        return torch.empty(0), (0,) * dims
    steps = [0 if n == 1 else s for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
    reach = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    line = tensor.detach().as_strided((reach,), (1,), tensor.storage_offset())
    return line, tuple(steps[:dims])


def beside(tensor: Tensor, more: Tensor | None, width: int) -> Tensor:
    """A tensor with columns and zeros after it, up to a width."""
    parts = [tensor]
    have = tensor.shape[-1]
    if more is not None:
        parts.append(more.expand(*tensor.shape[:3], -1))
        have += more.shape[-1]
    if have < width:
        parts.append(tensor.new_zeros(1, 1, 1, 1).expand(*tensor.shape[:3], width - have))
    return torch.cat(parts, -1) if len(parts) > 1 else tensor


class _Ready:
    """A problem with what the loops read: keys as panels, values of a whole number of vectors."""

    def __init__(
        self, problem: Problem, bias: Bias | None, query: Tensor, key: Tensor, value: Tensor
    ) -> None:
        from attnbias.native import attend, product

        self.lanes, self.panel = product.LANES, product.PANEL
        self.problem, self.bias = problem, bias
        self.query, self.key, self.value = (rows_of(t) for t in (query, key, value))
        self.batch, self.heads, self.n, self.size = query.shape
        self.groups, self.m, self.written = value.shape[1:]
        self.parts = parts = Parts.of(bias, self.batch, self.n, self.m)
        self.extra = 0 if parts.right is None else parts.right.shape[-1]
        # The heads that have panels of their own.
        apart = parts.right is not None and parts.right.shape[1] > 1
        self.owners = self.heads if apart else self.groups
        self.width = -(-self.written // self.lanes) * self.lanes
        self.wide = self.size + self.extra
        self.full = -(-self.m // self.panel) * self.panel
        self.value = beside(self.value, None, self.width)
        if apart and self.heads != self.groups:
            self.key = self.key.repeat_interleave(self.heads // self.groups, 1)
        self.panels = self._panels(attend, self.key, parts.right)
        self.keys = dropout.row_keys(problem.seed, query) if problem.dropout else None
        self.limit, self.factor = 0, 1.0
        if problem.dropout:
            self.limit = dropout.limit(problem.dropout)
            self.factor = 1.0 / (1.0 - problem.dropout)

    def _panels(self, attend: Any, key: Tensor, more: Tensor | None) -> Tensor:
        """``(batch, heads, panels of the keys with one row for each feature)``."""
        batch, heads, m, size = key.shape
        extra = 0 if more is None else more.shape[-1]
        panels = torch.empty(batch, heads, self.full * (size + extra))
        attend.pack(*flat(key), *flat(more), panels.view(-1), (batch, heads, m, size, extra))
        return panels

    def _bias(
        self, own: tuple[slice, slice, slice], strip: Tensor | None, left: int
    ) -> tuple[Any, ...]:
        """What the loops read of the bias, for some batch elements, heads and queries."""
        parts, (b, h, row) = self.parts, own

        def cut(tensor: Tensor | None, rows: bool = False) -> Tensor | None:
            if tensor is None:
                return None
            tensor = tensor[b if tensor.shape[0] > 1 else slice(None)]
            tensor = tensor[:, h if tensor.shape[1] > 1 else slice(None)]
            return tensor[:, :, row] if rows else tensor

        low, high = (t[b if len(t) > 1 else slice(None), row] for t in (parts.low, parts.high))
        if strip is not None:
            end = left + strip.shape[-1]
            low, high = low.clamp(left, end), high.clamp(left, end)
        low, high = low.contiguous(), high.contiguous()
        dense = cut(parts.dense, rows=True) if strip is None else strip
        keys = self.keys
        one, two = (
            (torch.empty(0, dtype=torch.int64),) * 2
            if keys is None
            else (t[b, h, row].reshape(-1) for t in keys)
        )
        edges = (low.view(-1), high.view(-1), 0 if len(low) == 1 else low.shape[1], one, two)
        return (
            *flat(cut(parts.left, rows=True)),
            *flat(cut(parts.table), 2),
            *flat(cut(parts.row), 2),
            *flat(dense),
            *edges,
        )

    def _pieces(self, buffers: Buffers) -> Any:
        """``(batch, heads, queries)`` and the strip of each call, with the key it starts at."""
        whole = (slice(0, self.batch), slice(0, self.heads), slice(0, self.n))
        built = None if self.bias is None else self.parts.built(self.bias)
        if built is None:
            yield whole, None, slice(0, self.m)
            return
        sizes = (self.batch, self.heads, self.n, self.m)
        for b, h, row, cols in own_parts.strips(
            built, self.parts, sizes, self.heads // self.groups
        ):
            piece = built[b, h, row, cols]
            size = (piece.batch, piece.heads, row.stop - row.start, cols.stop - cols.start)
            strip = buffers.take("strip", size, self.query).zero_()
            piece.add_to(strip)
            yield (b, h, row), strip, cols

    def forward(self) -> tuple[Tensor, Tensor]:
        from attnbias.native import attend

        loop: Any = attend.attend
        out = torch.zeros(self.batch, self.heads, self.n, self.written)
        lse = torch.full((self.batch, self.heads, self.n), -torch.inf)
        share, together = self.heads // self.groups, self.heads // self.owners
        with Buffers.lent() as buffers:
            for own, strip, cols in self._pieces(buffers):
                b, h, row = own
                query = self.query[own]
                groups = slice(h.start // share, -(-h.stop // share))
                owners = slice(h.start // together, -(-h.stop // together))
                panels, panel_steps = flat(self.panels[b, owners], 2)
                loop(
                    *flat(query),
                    panels,
                    panel_steps,
                    *flat(self.value[b, groups]),
                    *self._bias(own, strip, cols.start),
                    *flat(out[own]),
                    *flat(lse[own]),
                    (
                        *query.shape[:2],
                        share,
                        together,
                        query.shape[2],
                        self.m,
                        self.size,
                        self.extra,
                        self.width,
                        self.written,
                        self.n - 1 - row.start,
                        cols.start,
                    ),
                    self.problem.scale,
                    self.limit,
                    self.factor,
                )
        return out, lse

    def backward(
        self,
        out: Tensor,
        lse: Tensor,
        grad: Tensor | None,
        grad_lse: Tensor | None,
        total: Total,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from attnbias.native import attend, attend_backward

        parts = self.parts
        loop: Any = attend_backward.attend_backward
        wide = -(-self.wide // self.lanes) * self.lanes
        grad = torch.zeros_like(out) if grad is None else grad
        grad = rows_of(grad)
        delta = (grad * out).sum(-1)
        if grad_lse is not None:
            # A row that sees nothing has no score to give a gradient to.
            delta = delta - grad_lse.float().masked_fill(lse == -torch.inf, 0.0)
        key = self.key
        if wide != self.size:
            key = beside(key, parts.right, wide)
        value = self.value
        if self.owners != self.groups:
            value = value.repeat_interleave(self.heads // self.groups, 1)
        value_panels = self._panels(attend, value, None)
        terms = [] if total.bias is None else total.bias.terms()
        learned = [t.requires_grad for t in terms]
        want = {
            name: any(learned[at] for at in places)
            for name, places in (
                ("table", parts.tables),
                ("row", parts.rows),
                ("whole", parts.whole),
                ("strips", parts.strips),
            )
        }
        built = None
        if want["strips"]:
            assert total.bias is not None
            built = parts.built(total.bias)
        together = self.heads // self.owners
        scores = None
        if want["whole"] and parts.dense is not None:
            scores = torch.zeros_like(parts.dense)
        dk = torch.zeros(self.batch, self.owners, self.full, wide)
        dv = torch.zeros(self.batch, self.owners, self.full, self.width)
        pairs = (self.batch, self.heads)
        diagonal = torch.zeros(*pairs, self.n + self.m - 1) if want["table"] else None
        line = torch.zeros(*pairs, self.m) if want["row"] else None
        dq = torch.zeros(self.batch, self.heads, self.n, wide)
        with Buffers.lent() as buffers:
            for own, strip, cols in self._pieces(buffers):
                b, h, row = own
                query = self.query[own]
                owners = slice(h.start // together, -(-h.stop // together))
                steps = None if scores is None else scores
                if strip is not None and built is not None:
                    steps = buffers.take("steps", tuple(strip.shape), self.query).zero_()
                batch, heads, count = query.shape[:3]
                units = 1 if steps is not None and steps.shape[0] == 1 else batch
                units *= 1 if steps is not None and steps.shape[1] == 1 else heads // together
                chunks = self._chunks(units)
                part_q = torch.zeros(chunks, batch, heads, count, wide)
                part_k = dk[b, owners].contiguous()
                part_v = dv[b, owners].contiguous()
                part_line = None if line is None else line[b, h].contiguous()
                part_diagonal = (
                    torch.zeros(chunks, batch, heads, count + self.m - 1)
                    if diagonal is not None
                    else None
                )
                panels, panel_steps = flat(self.panels[b, owners], 2)
                nothing = torch.empty(0)
                loop(
                    *flat(query),
                    panels,
                    panel_steps,
                    *flat(key[b, owners]),
                    value_panels[b, owners].reshape(-1),
                    *flat(grad[own]),
                    *self._bias(own, strip, cols.start),
                    lse[own].reshape(-1),
                    delta[own].reshape(-1),
                    *flat(part_q, 4),
                    part_k.view(-1),
                    part_v.view(-1),
                    nothing if part_diagonal is None else part_diagonal.view(-1),
                    nothing if part_line is None else part_line.view(-1),
                    *flat(steps),
                    (
                        batch,
                        heads,
                        heads // together,
                        chunks,
                        count,
                        self.m,
                        self.size,
                        self.extra,
                        wide,
                        self.width,
                        self.written,
                        self.n - 1 - row.start,
                        cols.start,
                    ),
                    self.problem.scale,
                    self.limit,
                    self.factor,
                )
                dq[own] = part_q[0] if chunks == 1 else part_q.sum(0)
                if part_k.data_ptr() != dk.data_ptr() or part_k.shape != dk.shape:
                    dk[b, owners], dv[b, owners] = part_k, part_v
                    if line is not None and part_line is not None:
                        line[b, h] = part_line
                if diagonal is not None and part_diagonal is not None:
                    start = self.n - row.stop
                    diagonal[b, h, start : start + count + self.m - 1] += part_diagonal.sum(0)
                if built is not None and steps is not None:
                    with torch.enable_grad():
                        piece = built[b, h, row, cols]
                    total.add(piece, steps)
        self._pull(total, dq, dk, diagonal, line, scores)
        return self._main(dq, self.query), self._keys(dk, self.size), self._keys(dv, self.written)

    def _chunks(self, units: int) -> int:
        """Parts of the keys, so that every thread has some of as many as there are."""
        threads = torch.get_num_threads()
        if units % threads == 0 or units >= 4 * threads:
            return 1
        return max(1, min(CHUNKS, 2 * threads, self.full // (4 * self.panel)))

    def _main(self, grad: Tensor, like: Tensor) -> Tensor:
        return grad[..., : like.shape[-1]].to(self.problem.query.dtype)

    def _keys(self, grad: Tensor, width: int) -> Tensor:
        grad = grad[:, :, : self.m, :width]
        if self.owners != self.groups:
            batch, _, m, wide = grad.shape
            grad = grad.reshape(batch, self.groups, -1, m, wide).sum(2)
        return grad.to(self.problem.query.dtype)

    def _pull(
        self,
        total: Total,
        dq: Tensor,
        dk: Tensor,
        diagonal: Tensor | None,
        line: Tensor | None,
        scores: Tensor | None,
    ) -> None:
        """Gradients to the parameters of what is read as it is."""
        terms = [] if total.bias is None else total.bias.terms()
        parts = self.parts

        def give(at: int, *grads: Tensor) -> None:
            stored = terms[at].parameters()
            if terms[at].requires_grad:
                pairs = zip(grads, stored, strict=True)
                total.take(stored, [g.sum_to_size(p.shape).to(p.dtype) for g, p in pairs])

        for at in parts.tables:
            if diagonal is not None:
                give(at, diagonal)
        for at in parts.rows:
            if line is not None:
                give(at, line)
        for at in parts.whole:
            if scores is not None:
                give(at, scores)
        first = self.size
        for at in parts.columns:
            rank = terms[at].parameters()[0].shape[-1]
            give(at, dq[..., first : first + rank], dk[:, :, : self.m, first : first + rank])
            first += rank
