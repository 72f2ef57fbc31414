"""One cell of `benchmarks.fuse`: three states of one model by turns, or one in a fresh process."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import attnbias as ab
from attnbias.errors import AttnbiasError, Refused
from attnbias.fuse import modes
from benchmarks import common
from benchmarks.attention_cpu import failure
from benchmarks.fuse_bare import remove
from benchmarks.fuse_grid import BARE, FUSED, LINES, STOCK, Cell, fingerprint
from benchmarks.fuse_models import MORE_MOST, SUBJECTS, Subject, Variant, call, made, twin
from benchmarks.memory import peak_bytes

LARGE = 8.0  # seconds of a round from which there is no round to warm up
_slower: dict[str, dict[str, str]] = {}  # subject -> way -> why it is not tried at large sizes


class Missing(Exception):
    """A family that does not exist, or refuses its model."""


def least_rounds(seconds: float) -> int:
    """How many rounds a cell gets at least."""
    return 3 if seconds <= LARGE else 2 if seconds <= 45 else 1


def fits(variant: Variant, size: int) -> bool:
    """Whether the stock model's scores fit into what is free."""
    return variant.bytes(size) <= 0.9 * common.memory_bytes()[1]


def fused(model: Any) -> dict[str, Any]:
    """Fuse a model; what was done, for the result file."""
    try:
        done = ab.fuse(model, quiet=True, measure=False)
    except Refused as refusal:
        raise Missing(str(refusal)) from refusal
    if not done.sites:
        raise Missing(done.note or "nothing was replaced")
    return {
        "replaced": done.replaced,
        "bias": sorted({one.form for one in done.sites}),
        "left": {one.kind: one.reason[:200] for one in done.left},
    }


class Recorded:
    """A call of a fused model whose first time is written down: which lowerings ran."""

    def __init__(self, inner: Callable[[], Tensor]) -> None:
        self.inner, self.seen = inner, list[str]()

    def __call__(self) -> Tensor:
        if self.seen:
            return self.inner()
        with modes.recording() as seen:
            out = self.inner()
        self.seen = sorted({way for _, way in seen}) or ["its own code"]
        return out


def gap(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest value."""
    largest = (found.double() - wanted.double()).abs().nan_to_num(nan=math.inf).max()
    scale = float(wanted.abs().max()) or 1.0
    return min(float(f"{float(largest) / scale:.3g}"), 1e30)


def _tried(variant: Variant, cell: Cell, notes: dict[str, Any]) -> bool:
    """Whether a stock way takes part; a large cell has the one that won at the size before it."""
    known = _slower.get(cell.subject, {})
    if cell.seconds >= LARGE and variant.name in known:
        notes[variant.name] = {"status": "not tried", "reason": known[variant.name]}
        return False
    if not fits(variant, cell.size):
        words = f"estimate {variant.bytes(cell.size) / 1e9:.1f} GB"
        notes[variant.name] = {"status": "does not fit", "reason": words}
        return False
    return True


def best(
    base: Any, subject: Subject, cell: Cell, notes: dict[str, Any]
) -> tuple[Variant, Callable[[], Tensor]]:
    """The stock model at its fastest attention, by a trial of each; all trials go into `notes`."""
    candidates = [one for one in subject.variants if _tried(one, cell, notes)]
    if len(candidates) == 1:
        model = twin(base)
        candidates[0].prepare(model)
        return candidates[0], call(model, subject, cell.kind, cell.size)
    times: dict[str, float] = {}
    calls: dict[str, Callable[[], Tensor]] = {}
    last: Exception | None = None
    for variant in candidates:
        try:
            model = twin(base)
            variant.prepare(model)
            calls[variant.name] = call(model, subject, cell.kind, cell.size)
            taken = []
            for _ in range(2 if cell.seconds < LARGE else 1):
                start = time.perf_counter()
                calls[variant.name]()
                taken.append(time.perf_counter() - start)
            times[variant.name] = min(taken)
            notes[variant.name] = {"status": "ok", "trial_s": round(min(taken), 4)}
        except Exception as error:
            notes[variant.name], last = failure(error), error
    if not times:
        raise last if last is not None else MemoryError("no stock attention fits")
    name = min(times, key=lambda one: times[one])
    _slower[cell.subject] = {
        one: f"{taken / times[name]:.2f} times the time of {name} at {cell.size:,}"
        for one, taken in times.items()
        if one != name
    }
    if cell.kind == "token":  # its cache has grown: all lines begin at the same length
        calls[name].restart()  # type: ignore[attr-defined]
    return next(one for one in subject.variants if one.name == name), calls[name]


def timed(cell: Cell, budget: float) -> dict[str, Any]:
    """All lines of a cell by turns."""
    subject = SUBJECTS[cell.subject]
    notes: dict[str, Any] = {}
    cells: dict[str, dict[str, Any]] = {name: {"status": "ok"} for name in LINES}
    calls: dict[str, Callable[[], Tensor]] = {}
    base = made(subject, cell.size)
    fused(twin(base))  # a missing family costs no stock time
    variant, stock = best(base, subject, cell, notes)
    cells[STOCK]["variant"] = variant.name
    calls[STOCK] = stock
    for name in (FUSED, BARE):
        model = twin(base)
        try:
            variant.prepare(model)
            if name == FUSED:
                cells[name] |= fused(model)
            else:
                cells[name]["removed"] = remove(model)
            if cell.seconds >= LARGE:
                with contextlib.suppress(Exception):  # what loads once, on a smaller problem
                    call(model, subject, cell.kind, cell.size // 4)()
            made_call = call(model, subject, cell.kind, cell.size)
            calls[name] = Recorded(made_call) if name == FUSED else made_call
        except Exception as error:
            cells[name] = failure(error)
    for name, prepare in subject.more.items():
        if cell.size > MORE_MOST:
            break
        cells[name] = {"status": "ok"}
        try:
            model = twin(base)
            variant.prepare(model)
            prepare(model, subject.inputs(cell.size, torch.Generator().manual_seed(cell.size)))
            calls[name] = call(model, subject, cell.kind, cell.size)
        except Exception as error:
            cells[name] = failure(error)
    outputs: dict[str, Tensor] = {}

    def inspect(name: str, result: Tensor) -> None:
        outputs[name] = result.detach().clone()

    def on_error(name: str, error: Exception) -> None:
        cells[name] = {**cells[name], **failure(error)}

    timings = common.interleave(
        calls,
        budget=budget,
        least=1 if budget < 1 else least_rounds(cell.seconds),
        most=25,
        warmups=int(cell.seconds < LARGE),
        inspect=inspect,
        on_error=on_error,
    )
    ratios: dict[str, float] = {}
    for name, timing in timings.items():
        cells[name] |= timing.record()
    if FUSED in timings:
        cells[FUSED]["lowering"] = calls[FUSED].seen  # type: ignore[attr-defined]
    if STOCK in timings and FUSED in timings:
        over = timings[FUSED].over(timings[STOCK])
        ratios |= {"slower": over["ratio"], "faster": 1 / over["ratio"]}
        ratios |= {"faster_low": 1 / over["ratio_high"], "faster_high": 1 / over["ratio_low"]}
    if BARE in timings and FUSED in timings:
        over = timings[FUSED].over(timings[BARE])
        ratios |= {"over_bare": over["ratio"]}
        ratios |= {f"over_bare_{end}": over[f"ratio_{end}"] for end in ("low", "high")}
    ratios = {name: round(value, 4) for name, value in ratios.items()}
    for name, word in ((FUSED, "difference"), (BARE, "moved")):
        if name in outputs and STOCK in outputs:
            ratios[word] = gap(outputs[name], outputs[STOCK])
    for name in subject.more:
        if name in timings and STOCK in timings:
            faster = timings[STOCK].median / timings[name].median
            cells[name]["faster"] = round(faster, 4)
            cells[name]["difference"] = gap(outputs[name], outputs[STOCK])
    return {
        "status": "ok",
        "rounds": max((len(one.samples) for one in timings.values()), default=0),
        "threads": torch.get_num_threads(),
        "stock": notes,
        "ratios": ratios,
        "lines": cells,
    }


def _head(cell: Cell, started: str) -> dict[str, Any]:
    return {
        "subject": cell.subject,
        "kind": cell.kind,
        "size": cell.size,
        "unit": SUBJECTS[cell.subject].unit if cell.subject in SUBJECTS else "",
        "started": started,
        "fingerprint": fingerprint(cell.subject),
    }


def guarded(cell: Cell, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured of a cell, or why nothing was."""
    started, begin = common.now(), time.perf_counter()
    try:
        found = measure()
    except (Missing, ImportError, AttnbiasError) as error:
        found = {"status": "missing", "reason": str(error)[:300]}
    except Exception as error:
        found = failure(error)
    return {**_head(cell, started), **found, "seconds": round(time.perf_counter() - begin, 1)}


# Memory ------------------------------------------------------------------------------------------


def peak(cell: Cell, line: str, variant_name: str) -> dict[str, Any]:
    """One call of one line in this process, and the peak of its resident size in bytes."""
    subject = SUBJECTS[cell.subject]
    variant = next(one for one in subject.variants if one.name == variant_name)
    model: Any = made(subject, cell.size)
    variant.prepare(model)
    if line == FUSED:
        fused(model)
    elif line == BARE:
        remove(model)
    before = peak_bytes()["peak"]
    start = time.perf_counter()
    result = call(model, subject, cell.kind.split()[-1], cell.size)()
    return {
        "status": "ok",
        "variant": variant.name,
        "peak": peak_bytes()["peak"],
        "before": before,
        "seconds": round(time.perf_counter() - start, 3),
        "finite": bool(torch.isfinite(result).all()),
        "threads": torch.get_num_threads(),
    }


def compared(cell: Cell, rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Ratios of the peaks of a cell."""
    peaks = {name: row["peak"] for name, row in rows.items() if row["status"] == "ok"}
    ratios: dict[str, float] = {}
    if FUSED in peaks and STOCK in peaks:
        ratios["memory"] = peaks[FUSED] / peaks[STOCK]
    if FUSED in peaks and BARE in peaks:
        ratios["memory_over_bare"] = peaks[FUSED] / peaks[BARE]
        ratios["extra_mb"] = (peaks[FUSED] - peaks[BARE]) / 1e6
    if STOCK in peaks and BARE in peaks:
        ratios["stock_extra_mb"] = (peaks[STOCK] - peaks[BARE]) / 1e6
    return {name: round(value, 4) for name, value in ratios.items()}
