"""The ways of computing a case: ours, unbiased attention, and what others offer for a bias."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnbias as ab
from attnbias.errors import Refused
from benchmarks.gpu.case import DTYPES, Case, Parameters
from benchmarks.gpu.device import Device

FLOOR, CUDNN, BARE, OURS, PLANNED = "flash", "cuDNN", "ours, no bias", "ours", "ours, planned"
DENSE, CUDNN_DENSE, FLEX = "SDPA, dense bias", "cuDNN, dense bias", "FlexAttention"
FATAL = ("CUDA error", "Triton Error [CUDA]", "Triton Error [HIP]", "HIP error")
DENSE_SHARE = 0.3  # of the free memory that a dense bias may take

# query, key, value, parameters -> output
Forward = Callable[[Tensor, Tensor, Tensor, Parameters], Tensor]


class NotAvailable(RuntimeError):
    """A line cannot run here; the text says why."""


class TooLarge(RuntimeError):
    """A line does not fit into memory; the text says what it needs."""


@dataclass(frozen=True)
class Line:
    """One way. biased: whether its answer has the bias. learns: whether gradients reach what the
    kind learns. wanted: for which cases.
    """

    name: str
    build: Callable[[Case, Device, Parameters], tuple[Forward, dict[str, Any]]]
    biased: bool = True
    learns: bool = True
    wanted: Callable[[Case], bool] = lambda case: True


# Unbiased ----------------------------------------------------------------------------------------


def _restricted(backend: SDPBackend, case: Case, device: Device) -> Callable[..., Tensor]:
    """PyTorch's fused attention through one backend; a refusal says what the backend said."""

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=case.causal and mask is None,
                enable_gqa=mask is None and case.key_heads != case.heads,
            )  # fmt: skip

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        try:
            return call(q, k, v, mask)
        except RuntimeError as error:
            if "No viable backend" not in str(error) and "No available kernel" not in str(error):
                raise
        # PyTorch says why in warnings, beside an error that does not.
        with warnings.catch_warnings(record=True) as said, contextlib.suppress(RuntimeError):
            warnings.simplefilter("always")
            call(q, k, v, mask)
        why = [str(one.message).splitlines()[0] for one in said]
        raise NotAvailable("; ".join(why[1:] or why) or f"{backend.name.lower()} refuses this")

    return attend


def floor_backend(case: Case) -> SDPBackend:
    """Flash attention; it takes no float32, where PyTorch's other fused kernel does."""
    return (
        SDPBackend.EFFICIENT_ATTENTION
        if case.dtype == "float32" and case.device != "cpu"
        else SDPBackend.FLASH_ATTENTION
    )


def _unbiased(
    case: Case, device: Device, parameters: Parameters, backend: SDPBackend | None = None
) -> tuple[Forward, dict[str, Any]]:
    chosen = backend or floor_backend(case)
    attend = _restricted(chosen, case, device)
    return lambda q, k, v, given: attend(q, k, v), {"backend": chosen.name.lower()}


# Ours --------------------------------------------------------------------------------------------


def _ours(
    case: Case,
    device: Device,
    parameters: Parameters,
    lowering: str | None = "triton",
    biased: bool = True,
) -> tuple[Forward, dict[str, Any]]:
    kind = case.kind
    fixed = kind.make(case, parameters) if biased and not kind.learned else None
    notes: dict[str, Any] = {}
    if lowering is None:
        q, k, v, _ = case.inputs()
        for tensor in (q, k, v):
            tensor.requires_grad_(case.training)
        bias = fixed or kind.make(case, parameters)
        notes["lowering"] = ab.explain(q, k, v, bias=bias, causal=case.causal).chosen
        if notes["lowering"] == "triton":
            raise NotAvailable("the planner chooses the kernels: the line above")

    def forward(q: Tensor, k: Tensor, v: Tensor, given: Parameters) -> Tensor:
        # What is learned is another tensor in each step: its bias is made inside.
        bias = fixed if fixed is not None or not biased else kind.make(case, given)
        out = ab.attention(q, k, v, bias=bias, causal=case.causal, lowering=lowering)
        assert isinstance(out, Tensor)
        return out

    return forward, notes


# Rivals ------------------------------------------------------------------------------------------


def _dense(
    case: Case, device: Device, parameters: Parameters, backend: SDPBackend
) -> tuple[Forward, dict[str, Any]]:
    """The whole matrix, made before, in the dtype of the query; broadcast over the batch where the
    bias is. Its gradient is the matrix's: what the parameters would take more is not counted.
    """
    bias = case.kind.make(case, {name: t.detach() for name, t in parameters.items()})
    size = bias.batch * bias.heads * case.queries * case.m
    need, free = 4 * size * 2, DENSE_SHARE * device.free()
    if need > free:
        raise TooLarge(f"{need / 1e9:.1f} GB to make the matrix, {free / 1e9:.1f} GB at most")
    with torch.no_grad():
        mask = bias.dense().expand(-1, -1, case.queries, -1).to(DTYPES[case.dtype])
        if case.causal:
            hidden = torch.ones(case.queries, case.m, dtype=torch.bool, device=mask.device)
            mask = mask.masked_fill(hidden.triu_(1 + case.m - case.queries), -math.inf)
        mask = mask.contiguous()
    fitting = SDPBackend.MATH if device.rehearsal else backend  # the CPU has no such backend
    attend = _restricted(fitting, case, device)
    share = case.heads // case.key_heads

    def forward(q: Tensor, k: Tensor, v: Tensor, given: Parameters) -> Tensor:
        learned = q.requires_grad and case.kind.learned and backend != SDPBackend.CUDNN_ATTENTION
        one = mask.detach().requires_grad_() if learned else mask
        if share > 1:
            k, v = (t.repeat_interleave(share, 1) for t in (k, v))
        return attend(q, k, v, one.expand(case.batch, case.heads, -1, -1))

    return forward, {"matrix_mb": round(mask.numel() * mask.element_size() / 1e6, 1)}


def _flex(case: Case, device: Device, parameters: Parameters) -> tuple[Forward, dict[str, Any]]:
    """FlexAttention with the entries as a score function, compiled; causal by its block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    score = case.kind.score
    if score is None:
        raise NotAvailable("no score function writes this structure")
    ahead = case.m - case.queries
    blocks = None
    if case.causal:
        blocks = create_block_mask(
            lambda b, h, i, j: i + ahead >= j, None, None, case.queries, case.m, device=case.device
        )

    def attend(q: Tensor, k: Tensor, v: Tensor, given: Parameters) -> Tensor:
        out = flex_attention(
            q, k, v, score_mod=score(case, given), block_mask=blocks,
            enable_gqa=case.key_heads != case.heads,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    if device.rehearsal:
        warnings.filterwarnings("ignore", "flex_attention called without", UserWarning)
        return attend, {"compiled": False}
    # Each case by itself: past the compiler's limit it would silently run uncompiled.
    torch.compiler.reset()
    compiled: Any = torch.compile(attend, dynamic=False, fullgraph=True)
    return compiled, {"compiled": True}


def _only(backend: SDPBackend) -> Callable[..., tuple[Forward, dict[str, Any]]]:
    return functools.partial(_dense, backend=backend)


LINES = (
    Line(FLOOR, _unbiased, biased=False),
    Line(CUDNN, functools.partial(_unbiased, backend=SDPBackend.CUDNN_ATTENTION), biased=False),
    Line(BARE, functools.partial(_ours, biased=False), biased=False),
    Line(OURS, _ours),
    Line(PLANNED, functools.partial(_ours, lowering=None)),
    Line(DENSE, _only(SDPBackend.EFFICIENT_ATTENTION), learns=False, wanted=lambda c: c.dense),
    Line(CUDNN_DENSE, _only(SDPBackend.CUDNN_ATTENTION), learns=False, wanted=lambda c: c.dense),
    Line(FLEX, _flex, wanted=lambda c: c.flex),
)


def failure(error: BaseException) -> dict[str, str]:
    """A cell that could not be measured, in words."""
    words = (str(error).strip().splitlines() or [""])[0][:240]
    if isinstance(error, NotAvailable):
        return {"status": "not available", "reason": words}
    if isinstance(error, Refused):
        return {"status": "refused", "reason": str(error)[:240]}
    if isinstance(error, (TooLarge, torch.OutOfMemoryError, MemoryError)):
        return {"status": "does not fit", "reason": words}
    return {"status": "failed", "reason": f"{type(error).__name__}: {words}"}


def fatal(error: BaseException) -> bool:
    """Whether the device is lost to this process: nothing that it says from here on is true."""
    words = str(error)
    if "out of memory" in words or "out of resource" in words:
        return False
    return type(error).__name__ == "AcceleratorError" or any(one in words for one in FATAL)
