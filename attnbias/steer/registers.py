"""The search for register neurons: which MLP units write the patches of outlying norm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.hub.sites import Found, sites, unwrap
from attnbias.hub.sites import find as found_in
from attnbias.steer.hidden import HiddenCall
from attnbias.steer.rule import is_number
from attnbias.steer.scoring import bar
from attnbias.steer.states import collect, tower_of

if TYPE_CHECKING:
    from attnbias.steer.rules.test_time_registers import TestTimeRegisters

STANDS_OUT = 3.0  # outliers are longer than this many median norms, where no threshold is given
SPARSE = 0.5  # both the activation and the share of tokens of the code's sparsity filter
_BATCH = 16


class Batch(NamedTuple):
    """One forward: what is run, on what, and the tower that is meant."""

    model: nn.Module
    inputs: Mapping[str, Any]
    tower: str | None


def find(
    rule: TestTimeRegisters,
    model: nn.Module,
    images: Tensor | Iterable[Tensor | Mapping[str, Any]],
    top_k: int,
    threshold: float | None,
    detect_layer: int,
    highest_layer: int | None,
    sparse: bool,
    progress: bool,
) -> TestTimeRegisters:
    """See `TestTimeRegisters.fit`."""
    from attnbias.steer.rules.test_time_registers import RegisterFit

    tower = tower_of(rule, model, prefer="vision")
    entries = [entry for entry in found_in(model) if entry.site.tower == tower]
    detect = _layer(detect_layer, len(entries), "detect_layer")
    highest = detect if highest_layer is None else _layer(highest_layer, len(entries))
    if not is_number(top_k) or not top_k:
        raise AttnbiasError(f"top_k must be a whole number from 1, got {top_k!r}.")
    batches = _batches(images, model, entries[0], tower)
    with bar(2 * len(batches), progress, "TestTimeRegisters") as tick:
        norms = []
        for batch in batches:
            norms.append(_norms(batch, detect, rule.prefix))
            tick()
        every = torch.cat([part.flatten() for part in norms])
        line = _above(every) if threshold is None else float(threshold)
        totals: dict[int, Tensor] = {}
        marked = 0
        for batch, part in zip(batches, norms, strict=True):
            outlying = part > line
            some = outlying.any(1)
            if bool(some.any()):
                marked += int(some.sum())
                for layer, score in _scores(batch, outlying, highest, rule.prefix, sparse):
                    totals[layer] = totals.get(layer, torch.zeros_like(score)) + score
            tick()
    if not marked:
        raise AttnbiasError(
            f"no patch of {sum(len(p) for p in norms)} images has a norm above threshold {line:g} "
            f"after layer {detect} (the largest is {float(every.max()):g}): lower it, or give more "
            "images."
        )
    ranked = sorted(
        (
            (-float(value) / marked, layer, unit)
            for layer, total in totals.items()
            for value, unit in zip(*total.topk(min(top_k, len(total))), strict=True)
        )
    )[:top_k]
    record = RegisterFit(
        images=sum(len(part) for part in norms),
        marked=marked,
        threshold=line,
        median=float(every.median()),
        detect_layer=detect,
        highest_layer=highest,
        scores=tuple(-score for score, _, _ in ranked),
    )
    neurons = tuple((layer, int(unit)) for _, layer, unit in ranked)
    return replace(rule, neurons=neurons, fitted=record)


def _norms(batch: Batch, layer: int, prefix: int) -> Tensor:
    """Norms of the patches ``(images, patches)`` after a layer."""

    def norm(site: HiddenCall, hidden: Tensor) -> Tensor:
        return hidden[:, prefix:].double().square().sum(-1).sqrt()

    found = collect(batch.model, batch.inputs, layers=(layer,), tower=batch.tower, keep=norm)
    return found[0].hidden


def _scores(
    batch: Batch,
    outlying: Tensor,
    highest: int,
    prefix: int,
    sparse: bool,
) -> list[tuple[int, Tensor]]:
    """Each layer's mean absolute activation on outliers, summed over the images of a batch."""
    count = outlying.sum(1, keepdim=True).clamp_min(1)

    def score(site: HiddenCall, hidden: Tensor) -> Tensor:
        weight = (outlying / count).to(hidden.device, torch.float64)
        values = hidden[:, prefix:].double()
        means = torch.einsum("bt,btu->bu", weight, values.abs())
        if sparse:
            quiet = (hidden < SPARSE).double().mean(1)
            means = means * (quiet >= SPARSE)
        return means.sum(0)

    layers = tuple(range(highest + 1))
    states = collect(
        batch.model, batch.inputs, at="neurons", layers=layers, tower=batch.tower, keep=score
    )
    return [(state.site.layer, state.hidden) for state in states]


def _above(norms: Tensor) -> float:
    """The threshold where none is given: a multiple of the median norm."""
    line = STANDS_OUT * float(norms.median())
    if not bool((norms > line).any()):
        raise AttnbiasError(
            f"no patch stands out: the largest norm is {float(norms.max()):g} and the median "
            f"{float(norms.median()):g}, no {STANDS_OUT:g} times: give threshold= if the model has "
            "outliers nevertheless."
        )
    return line


def _layer(value: int, count: int, name: str = "highest_layer") -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not -count <= value < count:
        raise AttnbiasError(f"{name} must be a layer from {-count} to {count - 1}, got {value!r}.")
    return value % count


def _batches(images: Any, model: nn.Module, entry: Found, tower: str) -> list[Batch]:
    whole = unwrap(model)
    several = len({site.tower for site in sites(whole)}) > 1
    if isinstance(images, Tensor):
        size = _BATCH if images.ndim == 4 else max(len(images), 1)
        images = [images[start : start + size] for start in range(0, len(images), size)]
    found: list[Batch] = []
    for one in images:
        if isinstance(one, Tensor) and one.ndim == 4:
            # Pixels alone: a tower among others is run by itself.
            runs = entry.owners[-1] if several else model
            found.append(Batch(runs, {"pixel_values": one}, None))
        elif isinstance(one, Mapping):
            found.append(Batch(model, one, tower))
        else:
            got = f"shape {tuple(one.shape)}" if isinstance(one, Tensor) else type(one).__name__
            raise AttnbiasError(
                "images must be pixels (images, channels, height, width), batches of these or the "
                f"model's inputs, got {got}."
            )
    if not found:
        raise AttnbiasError("fit needs images, got none.")
    return found
