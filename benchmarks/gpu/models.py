"""(i) Whole models through `fuse`: T5's encoder, Swin v2 with windows of 24, a Pairformer block.

    python -m benchmarks.gpu.models [--rehearse] [--minutes M]

Real classes with random weights, bfloat16. Lines: the stock model in each way it has, the fused
one, and the same model with its bias left out, through PyTorch's fused kernel; the forward, and for
T5 and the Pairformer a training step. Errors are those of the output against the stock model in
float32, over its largest entry: the stock model's own beside the fused one's. `ab.fuse` replaces
nothing on a GPU by itself until this was measured; here the fused route is asked for.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnbias.fuse import modes
from benchmarks.gpu.device import Device, turns
from benchmarks.gpu.group import Context, Goal, Group
from benchmarks.gpu.lines import failure, fatal
from benchmarks.gpu.measure import Lost, short
from benchmarks.gpu.truth import gap

SCRIPT = "models"
FUSED, BARE, STOCK = "fused", "bias removed", "stock"
GOALS: tuple[Goal, ...] = ()
SWIN_BATCH = 64


@dataclass(frozen=True)
class Model:
    """A subject of `benchmarks.fuse_models` at a size, in a batch."""

    subject: str
    size: int
    batch: int = 1
    training: bool = False
    tier: int = 2

    @property
    def name(self) -> str:
        kind = "training" if self.training else "forward"
        return f"{self.subject}/{kind}/{self.batch}x{self.size}"


MODELS = (
    Model("T5", 2048, 4, tier=1),
    Model("T5", 8192),
    Model("T5", 16384),
    Model("T5, training", 4096, training=True),
    Model("Swin v2, window 24", 384, SWIN_BATCH, tier=1),
    Model("Pairformer", 256, tier=1),
    Model("Pairformer", 768),
    Model("Pairformer", 384, training=True),
)
TINY = (
    Model("T5", 20, 2),
    Model("T5, training", 20, training=True),
    Model("Swin v2, window 24", 32, 2),
    Model("Pairformer", 8),
)


def groups(rehearse: bool = False) -> list[Group]:
    return [
        Group(
            SCRIPT, one.name, partial(measure, one, rehearse), one.tier, 1e9 * one.batch * one.size
        )
        for one in (TINY if rehearse else MODELS)
    ]


def swin_v2(size: int, *, tiny: bool = False) -> torch.nn.Module:
    """The base model for 384 pixels, as published with windows of 24; or two small layers."""
    from transformers import Swinv2Config, Swinv2Model

    base = {
        "window_size": 24,
        "embed_dim": 128,
        "depths": [2, 2, 18, 2],
        "num_heads": [4, 8, 16, 32],
    }
    small = {"window_size": 4, "embed_dim": 16, "depths": [2], "num_heads": [2]}
    config = Swinv2Config(image_size=size, drop_path_rate=0.0, **(small if tiny else base))
    made: torch.nn.Module = Swinv2Model(config)
    return made


def subject_of(name: str) -> Any:
    from benchmarks.fuse_models import SUBJECTS, Subject, images

    if name.startswith("Swin v2"):
        own = SUBJECTS["Swin v2"].variants
        return Subject(name, "base, windows of 24", "pixels", swin_v2, images, own)
    return SUBJECTS[name]


def rehearsed(name: str) -> Any:
    """The same class with a layer or two."""
    from dataclasses import replace

    from benchmarks.fuse_models import t5

    subject = subject_of(name)
    if name.startswith("Pairformer"):
        return subject
    small = partial(t5, layers=1) if name.startswith("T5") else partial(swin_v2, tiny=True)
    return replace(subject, build=small)


def inputs(subject: Any, model: Model, device: Device, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a forward is given: so many of the subject's inputs, on the device."""
    generator = torch.Generator().manual_seed(model.size)
    made = [subject.inputs(model.size, generator) for _ in range(model.batch)]
    joined = {name: torch.cat([one[name] for one in made]) for name in made[0]}
    return {
        name: tensor.to(device.name, dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in joined.items()
    }


class Way:
    """A model in one state, on its inputs. route: what its fused modules must take."""

    def __init__(
        self, model: Any, given: dict[str, Tensor], training: bool, route: modes.Route | None
    ) -> None:
        self.model, self.given, self.training = model.train(training), given, training
        self.route = route

    def forward(self) -> Tensor:
        from benchmarks.fuse_models import output

        with torch.set_grad_enabled(self.training), modes.taking(self.route):
            found: Tensor = output(self.model(**self.given))
        return found

    def recorded(self) -> tuple[Tensor, list[str]]:
        """The output, and the lowerings that computed it."""
        with modes.recording() as seen:
            out = self.forward()
        return out, sorted({lowering for _, lowering in seen})

    def step(self, out: Tensor) -> None:
        self.model.zero_grad(set_to_none=True)
        loss: Any = out.float().square().mean()
        loss.backward()

    def both(self) -> None:
        out = self.forward()
        if self.training:
            self.step(out)


def measure(model: Model, rehearse: bool, context: Context) -> dict[str, Any]:
    from benchmarks.fuse_bare import remove
    from benchmarks.fuse_measure import fused
    from benchmarks.fuse_models import made, twin

    begin, device = time.perf_counter(), context.device
    subject = rehearsed(model.subject) if rehearse else subject_of(model.subject)
    whole = made(subject, model.size).to(device.name)
    with torch.no_grad():
        want = exact(whole, subject, model, device)
    base = whole.to(torch.bfloat16)
    given = inputs(subject, model, device, torch.bfloat16)
    prepares: dict[str, Callable[[Any], Any]] = {
        f"{STOCK}, {variant.name}": variant.prepare for variant in subject.variants
    }
    first = subject.variants[0].prepare
    prepares[FUSED] = lambda one: (first(one), fused(one))[1]  # which asks for its route, too
    prepares[BARE] = lambda one: (first(one), remove(one))[1]
    cells: dict[str, dict[str, Any]] = {}
    ways: dict[str, Way] = {}
    for name, prepare in prepares.items():
        context.say(name)
        try:
            if name in context.skip:
                raise RuntimeError("the process died, or hung, in this line")
            changed = twin(base)
            route: modes.Route | None = "fused" if name == FUSED else None
            with modes.taking(route):
                prepare(changed)
            way = Way(changed, given, model.training, route)
            out, lowerings = way.recorded()
            cells[name] = {"status": "ok"}
            if name == FUSED:
                cells[name]["lowering"] = lowerings
                if not lowerings:
                    raise RuntimeError("no attention of the fused model reached us")
            # Without its bias a model computes something else: by how much says what is at stake.
            cells[name]["moved" if name == BARE else "error"] = {"output": gap(out, want)}
            del out
            cells[name]["memory_both"] = device.peak(way.both)
            ways[name] = way
        except Exception as error:
            if fatal(error):
                raise Lost(name, error) from error
            cells[name] = failure(error)
        gc.collect()
        device.empty()

    def on_error(name: str, error: Exception) -> None:
        cells[name] = failure(error)

    lines: Any = {name: (None, lambda _, way=way: way.both()) for name, way in ways.items()}
    found = turns(device, lines, budget=context.budget, least=3, on_error=on_error)
    for name, timing in found.items():
        cells[name]["both" if model.training else "forward"] = {
            "median_s": short(timing.median), "low_s": short(timing.low),
            "high_s": short(timing.high), "rounds": len(timing.samples),
        }  # fmt: skip
    stock = [timing.median for name, timing in found.items() if name.startswith(STOCK)]
    compared = {}
    if FUSED in found and stock:
        compared["faster"] = round(min(stock) / found[FUSED].median, 4)
    if FUSED in found and BARE in found:
        compared["over_bare"] = round(found[FUSED].median / found[BARE].median, 4)
    return {
        "status": "ok",
        "model": {"subject": model.subject, "size": model.size, "batch": model.batch,
                  "training": model.training},
        "lines": cells,
        "ratios": compared,
        "seconds": round(time.perf_counter() - begin, 1),
    }  # fmt: skip


def exact(whole: Any, subject: Any, model: Model, device: Device) -> Tensor:
    """The stock model's output in float32."""
    from benchmarks.fuse_models import output, twin

    one = twin(whole).eval()
    subject.variants[0].prepare(one)
    return output(one(**inputs(subject, model, device, torch.float32))).double()


if __name__ == "__main__":
    from benchmarks.gpu.__main__ import main

    sys.exit(main(["--only", SCRIPT, *sys.argv[1:]]))
