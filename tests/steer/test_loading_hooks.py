"""Every hook of a rule on models that are offloaded, adapted or compiled: as on the plain one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import attnbias as ab
from attnbias import KeyBias
from tests.cases.rule import RELATIVE, off
from tests.steer.models import MAKERS, Subject


@dataclass(frozen=True, kw_only=True)
class Everything(ab.steer.Rule):
    """An edit at every hook, in the middle layer; `part` leaves the others out."""

    heads: Any = "all"
    layers: Any = (1,)
    part: str = ""
    hidden_at: ClassVar[tuple[str, ...]] = ("layer", "mlp", "attention", "neurons")
    reads_hidden: ClassVar[bool] = True

    def at(self, name: str) -> bool:
        return self.part in ("", name)

    def bias(self, site: Any) -> ab.Bias | None:
        size = site.hidden.norm(dim=-1)  # what the layer reads, per token
        weight = size[:, None, :] * (site.key_positions == 3)[:, None, : size.shape[1]]
        return KeyBias(weight) if self.at("bias") else None

    def vectors(self, site: Any) -> Any:
        return ab.steer.Vectors(query=site.query * 1.5) if self.at("vectors") else None

    def outputs(self, site: Any, out: Tensor) -> Tensor | None:
        return out * 0.5 if self.at("outputs") else None

    def hidden(self, site: Any, hidden: Tensor) -> Tensor | None:
        return hidden + 0.3 if self.at(site.at) else None

    def logits(self, step: Any) -> Tensor | None:
        return step.logits.roll(1, -1) if self.at("logits") else None


PARTS = ("bias", "vectors", "outputs", "layer", "mlp", "attention", "neurons", "logits")


def offloaded(subject: Subject, folder: Path) -> nn.Module:
    import accelerate

    model = copy.deepcopy(subject.model)
    cpu = torch.device("cpu")
    accelerate.disk_offload(model, offload_dir=str(folder / "weights"), execution_device=cpu)
    return model


def adapted(subject: Subject, folder: Path) -> nn.Module:
    """LoRA layers with nothing in them yet: they compute, and change nothing."""
    import peft

    targets = ["q_proj", "o_proj", "down_proj"]
    model = peft.get_peft_model(
        copy.deepcopy(subject.model), peft.LoraConfig(target_modules=targets)
    )
    return model.eval()


def compiled(subject: Subject, folder: Path) -> nn.Module:
    made: nn.Module = torch.compile(copy.deepcopy(subject.model), backend="eager")
    return made


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("make", [offloaded, adapted, compiled])
@torch.no_grad()
def test_every_hook(make: Callable[[Subject, Path], nn.Module], tmp_path: Path) -> None:
    subject = MAKERS["mistral"]()
    model = make(subject, tmp_path)
    plain = subject.run(model)
    assert off(plain, subject.run()) < RELATIVE
    for part in ("", "neurons") if make is compiled else ("", *PARTS):  # compiling takes seconds
        rule = Everything(part=part)
        with ab.steer(subject.model, rule):
            wanted = subject.run()
        with ab.steer(model, rule):
            found = subject.run(model)
        assert off(found, wanted) < RELATIVE, part
        assert off(plain, wanted) > 30 * RELATIVE, part
    assert torch.equal(subject.run(model), plain)


@torch.no_grad()
def test_compiled_code_knows_which_layers_are_edited() -> None:
    """Contexts with other edits, in turn: no graph of one runs in another, none is made twice."""
    import torch._dynamo.config as config

    counted = [0]

    def backend(graph: Any, _: Any) -> Any:
        counted[0] += 1
        return graph.forward

    subject = MAKERS["mistral"]()
    model = torch.compile(copy.deepcopy(subject.model), backend=backend)
    rules = (
        ab.rules.KeyShift(keys=[1], factor=2.0, heads="all"),
        Everything(),
        Everything(part="mlp", layers=(0, 2)),
    )
    before = config.skip_nnmodule_hook_guards
    plain = subject.run()
    totals = []
    for _ in range(3):
        for rule in rules:
            with ab.steer(subject.model, rule):
                wanted = subject.run()
            with ab.steer(model, rule):
                assert off(subject.run(model), wanted) < RELATIVE
            assert off(plain, wanted) > 30 * RELATIVE
        assert off(subject.run(model), plain) < RELATIVE
        totals.append(counted[0])
    assert totals[0] == totals[-1] > 0
    assert config.skip_nnmodule_hook_guards == before
