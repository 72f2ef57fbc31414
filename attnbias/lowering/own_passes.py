"""The two passes of the compiled attention, strip after strip."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnbias.lowering.nest import Buffers
from attnbias.lowering.own_ready import Ready, beside, flat, rows_of
from attnbias.lowering.total import Total

CHUNKS = 8  # of the keys at most, in the backward pass


def forward(ready: Ready) -> tuple[Tensor, Tensor]:
    from attnbias.native import attend

    loop: Any = attend.attend
    out = torch.zeros(ready.batch, ready.heads, ready.n, ready.written)
    lse = torch.full((ready.batch, ready.heads, ready.n), -torch.inf)
    share, together = ready.heads // ready.groups, ready.heads // ready.owners
    with Buffers.lent() as buffers:
        for own, strip, cols in ready.pieces(buffers):
            b, h, row = own
            query = ready.query[own]
            groups = slice(h.start // share, -(-h.stop // share))
            owners = slice(h.start // together, -(-h.stop // together))
            panels, panel_steps = flat(ready.panels[b, owners], 2)
            loop(
                *flat(query),
                panels,
                panel_steps,
                *flat(ready.value[b, groups]),
                *ready.given(own, strip, cols.start),
                *flat(out[own]),
                *flat(lse[own]),
                (
                    *query.shape[:2],
                    share,
                    together,
                    query.shape[2],
                    ready.m,
                    ready.size,
                    ready.extra,
                    ready.width,
                    ready.written,
                    ready.n - 1 - row.start,
                    cols.start,
                ),
                ready.problem.scale,
                ready.limit,
                ready.factor,
            )
    return out, lse


def backward(
    ready: Ready,
    out: Tensor,
    lse: Tensor,
    grad: Tensor | None,
    grad_lse: Tensor | None,
    total: Total,
) -> tuple[Tensor, Tensor, Tensor]:
    from attnbias.native import attend, attend_backward

    parts = ready.parts
    loop: Any = attend_backward.attend_backward
    wide = -(-ready.wide // ready.lanes) * ready.lanes
    grad = torch.zeros_like(out) if grad is None else grad
    grad = rows_of(grad)
    delta = (grad * out).sum(-1)
    if grad_lse is not None:
        # A row that sees nothing has no score to give a gradient to.
        delta = delta - grad_lse.float().masked_fill(lse == -torch.inf, 0.0)
    key = ready.key
    if wide != ready.size:
        key = beside(key, parts.right, wide)
    value = ready.value
    if ready.owners != ready.groups:
        value = value.repeat_interleave(ready.heads // ready.groups, 1)
    value_panels = ready.make_panels(attend, value, None)
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
    together = ready.heads // ready.owners
    scores = None
    if want["whole"] and parts.dense is not None:
        scores = torch.zeros_like(parts.dense)
    dk = torch.zeros(ready.batch, ready.owners, ready.full, wide)
    dv = torch.zeros(ready.batch, ready.owners, ready.full, ready.width)
    pairs = (ready.batch, ready.heads)
    diagonal = torch.zeros(*pairs, ready.n + ready.m - 1) if want["table"] else None
    line = torch.zeros(*pairs, ready.m) if want["row"] else None
    dq = torch.zeros(ready.batch, ready.heads, ready.n, wide)
    with Buffers.lent() as buffers:
        for own, strip, cols in ready.pieces(buffers):
            b, h, row = own
            query = ready.query[own]
            owners = slice(h.start // together, -(-h.stop // together))
            steps = None if scores is None else scores
            if strip is not None and built is not None:
                steps = buffers.take("steps", tuple(strip.shape), ready.query).zero_()
            batch, heads, count = query.shape[:3]
            units = 1 if steps is not None and steps.shape[0] == 1 else batch
            units *= 1 if steps is not None and steps.shape[1] == 1 else heads // together
            chunks = _chunks(ready, units)
            part_q = torch.zeros(chunks, batch, heads, count, wide)
            part_k = dk[b, owners].contiguous()
            part_v = dv[b, owners].contiguous()
            part_line = None if line is None else line[b, h].contiguous()
            part_diagonal = (
                torch.zeros(chunks, batch, heads, count + ready.m - 1)
                if diagonal is not None
                else None
            )
            panels, panel_steps = flat(ready.panels[b, owners], 2)
            nothing = torch.empty(0)
            loop(
                *flat(query),
                panels,
                panel_steps,
                *flat(key[b, owners]),
                value_panels[b, owners].reshape(-1),
                *flat(grad[own]),
                *ready.given(own, strip, cols.start),
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
                    ready.m,
                    ready.size,
                    ready.extra,
                    wide,
                    ready.width,
                    ready.written,
                    ready.n - 1 - row.start,
                    cols.start,
                ),
                ready.problem.scale,
                ready.limit,
                ready.factor,
            )
            dq[own] = part_q[0] if chunks == 1 else part_q.sum(0)
            if part_k.data_ptr() != dk.data_ptr() or part_k.shape != dk.shape:
                dk[b, owners], dv[b, owners] = part_k, part_v
                if line is not None and part_line is not None:
                    line[b, h] = part_line
            if diagonal is not None and part_diagonal is not None:
                start = ready.n - row.stop
                diagonal[b, h, start : start + count + ready.m - 1] += part_diagonal.sum(0)
            if built is not None and steps is not None:
                with torch.enable_grad():
                    piece = built[b, h, row, cols]
                total.add(piece, steps)
    _pull(ready, total, dq, dk, diagonal, line, scores)
    return _main(ready, dq), _keys(ready, dk, ready.size), _keys(ready, dv, ready.written)


def _chunks(ready: Ready, units: int) -> int:
    """Parts of the keys, so that every thread has some of as many as there are."""
    threads = torch.get_num_threads()
    if units % threads == 0 or units >= 4 * threads:
        return 1
    return max(1, min(CHUNKS, 2 * threads, ready.full // (4 * ready.panel)))


def _main(ready: Ready, grad: Tensor) -> Tensor:
    return grad[..., : ready.size].to(ready.problem.query.dtype)


def _keys(ready: Ready, grad: Tensor, width: int) -> Tensor:
    grad = grad[:, :, : ready.m, :width]
    if ready.owners != ready.groups:
        batch, _, m, wide = grad.shape
        grad = grad.reshape(batch, ready.groups, -1, m, wide).sum(2)
    return grad.to(ready.problem.query.dtype)


def _pull(
    ready: Ready,
    total: Total,
    dq: Tensor,
    dk: Tensor,
    diagonal: Tensor | None,
    line: Tensor | None,
    scores: Tensor | None,
) -> None:
    """Gradients to the parameters of what is read as it is."""
    terms = [] if total.bias is None else total.bias.terms()
    parts = ready.parts

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
    first = ready.size
    for at in parts.columns:
        rank = terms[at].parameters()[0].shape[-1]
        give(at, dq[..., first : first + rank], dk[:, :, : ready.m, first : first + rank])
        first += rank
