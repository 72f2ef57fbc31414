"""The one entry to computing: `attention`, `explain` and `merge`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attnbias.bias import Bias, Causal, add
from attnbias.errors import AttnbiasError, Refused
from attnbias.lowering import Explanation, Problem, choose, explanation
from attnbias.lowering.dropout import draw_seed
from attnbias.lowering.normaliser import NORMALISERS


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Bias | None = None,
    causal: bool = False,
    offset: int | None = None,
    scale: float | None = None,
    sink: Tensor | None = None,
    normaliser: str = "softmax",
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
    lowering: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention under a structured bias, exactly.

    .. math:: o_i = \frac{\sum_j e^{s_{ij}} v_j}{\sum_j e^{s_{ij}} + e^{z}}, \quad
              s_{ij} = \mathrm{scale}\; q_i \cdot k_j + B_{ij}

    where the term ``e^z`` is there only with `sink`. Output and log-sum-exp are differentiable in
    query, key, value, `sink` and the stored parameters of the bias, through every lowering; the
    gradients have the same bits in every run.

    Args:
        query: ``(batch, heads, queries, size)``, float16, bfloat16, float32 or float64.
        key: ``(batch, key heads, keys, size)``; the number of heads is a multiple of key heads
            (grouped queries: query head ``h`` reads key head ``h // (heads / key heads)``).
        value: ``(batch, key heads, keys, value size)``.
        bias: a `Bias` of shape ``(batch | 1, heads | 1, queries, keys)``, added to the scaled
            scores.
        causal: hide keys after the query: ``j > i + offset``.
        offset: position of query 0 minus position of key 0; by default ``keys - queries`` (aligned
            to the end).
        scale: factor of the scores; by default ``1 / sqrt(size)``.
        sink: ``(heads,)``, one extra logit z per head that takes part in the normalisation and
            carries no value; with softmax only.
        normaliser: how a row of scores s becomes weights, M keys in all (hidden ones too):
            ``"softmax"``; ``"softmax_off_by_one"``, ``e^s / (1 + sum e^s)``, a sink of zeros;
            ``"sigmoid"``, ``sigmoid(s - log M)`` (a constant in the bias is another shift);
            ``"relu"``, ``max(s, 0) / M``; ``"signed"``, ``sign(s) e^|s| / sum e^|s|``. A hidden
            key has weight 0 in all. Sources and what parts of the keys need to be joined:
            `attnbias.lowering.normaliser`.
        dropout: probability with which a weight is dropped after it was normalised; weights that
            stay are divided by ``1 - dropout``. The log-sum-exp is that of all weights. Pass 0 when
            evaluating.
        generator: where the seed of the dropout pattern is drawn from; by default PyTorch's own,
            so that ``torch.manual_seed`` governs it. One draw for each call with dropout, none
            without.
        lowering: name of a lowering to force; by default the planner takes the cheapest exact one.
        return_lse: also return the log-sum-exp ``(batch, heads, queries)`` in float32 (float64),
            with the sink in it.

    Returns:
        ``(batch, heads, queries, value size)`` in the dtype of the query. A row that sees no key
        gives output 0 and log-sum-exp minus infinity. Any length may be zero.

    Raises:
        AttnbiasError: shapes, dtypes or options that do not fit; one sentence says which.
        Refused: a forced lowering that does not offer for this problem.
    """
    query, key, value = _autocast(query, key, value)
    problem = _problem(
        query, key, value, bias, causal, offset, scale, normaliser, dropout, generator
    )
    row = NORMALISERS[normaliser]
    if return_lse and not row.lse:
        raise Refused(
            f"return_lse=True needs a log-sum-exp, and normaliser {normaliser!r} has none: its "
            "outputs over parts of the keys are added."
        )
    if sink is not None and normaliser != "softmax":
        raise Refused(f"sink goes with normaliser 'softmax', got {normaliser!r}.")
    if row.sink is not None:
        sink = torch.full((problem.heads,), row.sink, device=query.device)
    if sink is not None and sink.shape != (problem.heads,):
        raise AttnbiasError(
            f"sink must have shape (heads,) = ({problem.heads},), got {tuple(sink.shape)}."
        )
    with torch.autocast(query.device.type, enabled=False):
        out, lse = choose(problem, lowering).run(problem)
        if sink is not None:
            out, lse = _with_sink(out, lse, sink)
    return (out, lse) if return_lse else out


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Bias | None = None,
    causal: bool = False,
    offset: int | None = None,
    scale: float | None = None,
    normaliser: str = "softmax",
    dropout: float = 0.0,
) -> Explanation:
    """Offers, refusals and the choice for a problem, without computing it. ``print()`` shows a
    table.

    Arguments as in `attention`; tensors on the ``meta`` device are fine: only shapes and dtypes
    are read.
    """
    query, key, value = _autocast(query, key, value)
    problem = _problem(query, key, value, bias, causal, offset, scale, normaliser, dropout)
    words = (
        f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}, "
        f"{str(query.dtype).removeprefix('torch.')}, {query.device.type}; "
        f"bias: {'none' if problem.bias is None else problem.bias!r}"
    )
    return explanation(problem, words)


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    r"""Attention over the union of disjoint key sets from attention over each, exactly.

    .. math:: \ell = \log \sum_p e^{\ell_p}, \qquad o = \sum_p e^{\ell_p - \ell}\, o_p

    Args:
        parts: pairs ``(output (..., queries, value size), lse (..., queries))``. An empty part is
            (0, -inf). Attention with the normalisers ``softmax`` and ``signed``; of
            ``softmax_off_by_one`` merge parts of plain softmax with one part (0, 0): the 1 counts
            once. Outputs of ``sigmoid`` and ``relu`` have no lse: they are added.

    Returns:
        ``(output, lse)``, differentiable; the output in the dtype of the first part's output. A
        row that is empty in every part gives (0, -inf), without NaN in values or gradients.
    """
    parts = list(parts)
    if not parts:
        raise AttnbiasError("merge needs at least one (output, lse) pair, got an empty list.")
    for out, lse in parts:
        if out.shape[:-1] != lse.shape:
            raise AttnbiasError(
                "merge takes pairs (output (..., queries, size), lse (..., queries)), got shapes "
                f"{tuple(out.shape)} and {tuple(lse.shape)}."
            )
    lses = torch.stack([lse for _, lse in parts])
    seen = (lses > -torch.inf).any(0)
    # logsumexp of nothing but -inf has a NaN gradient: such rows are taken out before and put back
    # after.
    safe = torch.where(seen, lses, 0.0)
    total = safe.logsumexp(0)
    weights = torch.where(seen, (safe - total).exp(), 0.0)
    out = sum(w[..., None] * o.to(w.dtype) for w, (o, _) in zip(weights, parts, strict=True))
    assert isinstance(out, Tensor)
    return out.to(parts[0][0].dtype), torch.where(seen, total, -torch.inf)


def _with_sink(out: Tensor, lse: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """`merge` with a part of one key of value 0: the output shrinks by what that key takes."""
    logit = sink.to(lse.dtype)[None, :, None].expand_as(lse)
    seen = (lse > -torch.inf) | (logit > -torch.inf)
    # Rows that see nothing have NaN gradients in both: they are taken out before and put back.
    safe, other = (torch.where(seen, one, 0.0) for one in (lse, logit))
    weight = torch.where(seen, (safe - other).sigmoid(), 0.0)
    total = torch.where(seen, torch.logaddexp(safe, other), -torch.inf)
    return (out.to(lse.dtype) * weight[..., None]).to(out.dtype), total


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """The fused operators ignore autocast, so it is done here, as for every matrix product."""
    kind = tensors[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return list(tensors)
    to = torch.get_autocast_dtype(kind)
    return [t.to(to) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors]


def _problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | None,
    causal: bool,
    offset: int | None,
    scale: float | None,
    normaliser: str = "softmax",
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> Problem:
    _check(query, key, value)
    queries, keys, size = query.shape[2], key.shape[2], query.shape[3]
    if offset is not None and not causal:
        raise AttnbiasError("offset goes with causal=True; a bias carries its own offset.")
    if bias is not None and not isinstance(bias, Bias):
        raise AttnbiasError(
            f"bias must be an attnbias Bias, got {type(bias).__name__}; "
            "a tensor of scores goes in as ab.Dense(tensor)."
        )
    if bias is not None:
        _check_bias(bias, query, keys)
        bias = bias.bind(query)
    if causal:
        mask = Causal(queries, keys, offset=offset, device=query.device)
        bias = mask if bias is None else add(bias, mask)
    if scale is None:
        scale = 1.0 / math.sqrt(size) if size else 1.0
    if normaliser not in NORMALISERS:
        raise AttnbiasError(
            f"normaliser must be one of {', '.join(NORMALISERS)}, got {normaliser!r}."
        )
    if not 0.0 <= dropout < 1.0:
        raise AttnbiasError(f"dropout must be a probability below 1, got {dropout!r}.")
    seed = draw_seed(generator) if dropout and query.device.type != "meta" else 0
    core = NORMALISERS[normaliser].core
    return Problem(query, key, value, bias, float(scale), core, float(dropout), seed)


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            raise AttnbiasError(
                f"{name} must have shape (batch, heads, length, size), got {tuple(tensor.shape)}."
            )
    kinds = {t.dtype for t in (query, key, value)}
    allowed = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if len(kinds) > 1 or query.dtype not in allowed:
        raise AttnbiasError(
            "query, key and value must share one dtype of float16, bfloat16, float32, float64, "
            f"got {query.dtype}, {key.dtype}, {value.dtype}."
        )
    if len({t.device for t in (query, key, value)}) > 1:
        raise AttnbiasError(
            f"query, key and value must be on one device, got {query.device}, {key.device}, "
            f"{value.device}."
        )
    if key.shape[:3] != value.shape[:3]:
        raise AttnbiasError(
            "key and value must agree in batch, heads and length, got "
            f"{tuple(key.shape)} and {tuple(value.shape)}."
        )
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise AttnbiasError(
            "query and key must agree in batch and size, got "
            f"{tuple(query.shape)} and {tuple(key.shape)}."
        )
    if query.shape[3] == 0:
        raise AttnbiasError("query and key must have at least one feature, got size 0.")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise AttnbiasError(
            "the number of query heads must be a multiple of the number of key heads, got "
            f"{query.shape[1]} and {key.shape[1]}."
        )


def _check_bias(bias: Bias, query: Tensor, keys: int) -> None:
    have = (query.shape[0], query.shape[1], query.shape[2], keys)
    for name, size, want, free in zip(
        ("batch", "heads", "queries", "keys"), bias.shape, have, (1, 1, None, None), strict=True
    ):
        if size != want and size != free:
            raise AttnbiasError(
                f"bias of shape {bias.shape} does not fit the problem "
                f"(batch, heads, queries, keys) = {have}: {name} is {size}."
            )


__all__ = ["attention", "explain", "merge"]
