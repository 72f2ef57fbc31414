"""What every fused family must pass: subclass `FuseCase`; say how to build a model, its inputs."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import attnbias as ab
from attnbias.errors import AttnbiasError
from attnbias.fuse import modes

VOCABULARY = 97


class NoSuchError(Exception):
    """Raised inside a block, to see that leaving it works."""


def state(model: nn.Module) -> dict[str, Any]:
    """All that a fusion may touch: attributes of every module and config, hooks, registries."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    found: dict[str, Any] = {
        "functions": dict(ALL_ATTENTION_FUNCTIONS),
        "local functions": dict(ALL_ATTENTION_FUNCTIONS._local_mapping),
        "masks": dict(ALL_MASK_ATTENTION_FUNCTIONS),
        "local masks": dict(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping),
    }
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            kept = dict(value) if isinstance(value, dict) else value
            found[f"{name}.{key}"] = kept
        config = getattr(module, "config", None)
        if config is not None:
            found[f"{name}.config.vars"] = dict(vars(config))
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two states are the same objects under the same names, in the same order."""
    assert list(one) == list(other)
    for name, value in one.items():
        if isinstance(value, dict):
            assert list(value) == list(other[name]), name
            assert all(value[key] is other[name][key] for key in value), name
        else:
            assert value is other[name], name


class FuseCase:
    """The inherited case.

    A subclass says how to `build` a small model of the real class, its `inputs`, and how to leave
    the bias out (`without`). `tables` names the parameters of the bias, redrawn from N(0, 1);
    `sharp` the projections that are enlarged so that heads are sharp. What else a class can do it
    says by its bases (`tests.cases.fuse_parts`): Padded, Mapped, Trained, Pretrained, Generating.
    """

    tables: ClassVar[str] = r"relative_attention_bias|relative_position_bias"
    sharp: ClassVar[str] = r"(SelfAttention|EncDecAttention)\.q\.weight"
    sharpness: ClassVar[float] = 3.0
    length: ClassVar[int] = 45
    tolerance: ClassVar[float] = 1e-5  # of eval outputs, relative to the largest

    # What a subclass supplies ---------------------------------------------------------------------

    def build(self, **changes: Any) -> nn.Module:
        """The small model, in eval mode; `changes` go into its config."""
        raise NotImplementedError

    def inputs(self, batch: int, length: int) -> dict[str, Tensor]:
        """Random keyword arguments of a forward, without padding."""
        return {"input_ids": torch.randint(1, VOCABULARY, (batch, length))}

    def output(self, found: Any) -> Tensor:
        """What is compared of a model's output."""
        out: Tensor = found.logits if hasattr(found, "logits") else found.last_hidden_state
        return out

    @contextlib.contextmanager
    def without(self, model: nn.Module) -> Iterator[None]:
        """The model without its bias: by default its tables are zero."""
        kept = {name: one.detach().clone() for name, one in self.biases(model)}
        try:
            with torch.no_grad():
                for _, one in self.biases(model):
                    one.zero_()
            yield
        finally:
            with torch.no_grad():
                for name, one in self.biases(model):
                    one.copy_(kept[name])

    # Built in -------------------------------------------------------------------------------------

    def biases(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return [pair for pair in model.named_parameters() if re.search(self.tables, pair[0])]

    def model(self, **changes: Any) -> nn.Module:
        """Built, tables redrawn from N(0, 1), heads sharpened."""
        torch.manual_seed(1)
        model = self.build(**changes).eval()
        with torch.no_grad():
            for _, one in self.biases(model):
                one.normal_()
            for name, one in model.named_parameters():
                if re.search(self.sharp, name):
                    one.mul_(self.sharpness)
        torch.manual_seed(2)
        return model

    def off(self, found: Tensor, wanted: Tensor) -> float:
        return float(((found - wanted).abs().max() / wanted.abs().max()).detach())

    def run(self, model: nn.Module, given: dict[str, Tensor], route: Any = "fused") -> Tensor:
        with torch.no_grad(), modes.taking(route):
            return self.output(model(**given))

    # The tests ------------------------------------------------------------------------------------

    @pytest.mark.parametrize("length", [1, 2, 17, 45, 131])
    def test_eval(self, length: int) -> None:
        model = self.model()
        given = self.inputs(2, length)
        wanted = self.run(model, given)
        with ab.fuse(model, quiet=True, measure=False):
            found = self.run(model, given)
        assert self.off(found, wanted) <= self.tolerance

    def test_bias_matters(self) -> None:
        model = self.model()
        given = self.inputs(2, self.length)
        wanted = self.run(model, given)
        with self.without(model):
            bare = self.run(model, given)
        assert self.off(bare, wanted) >= 1e-2

    def test_fused_route_is_taken(self) -> None:
        model = self.model()
        with ab.fuse(model, quiet=True, measure=False) as fused, modes.recording() as seen:
            self.run(model, self.inputs(1, self.length))
        assert len(seen) >= fused.replaced > 0
        assert all(one.lowering for one in fused.sites)
        assert "attention modules fused" in str(fused)

    def test_small_calls_are_stock(self) -> None:
        model = self.model()
        given = self.inputs(2, 5)
        wanted = self.run(model, given)
        with ab.fuse(model, quiet=True, measure=False):
            found = self.run(model, given, "stock")
        assert torch.equal(found, wanted) or self.off(found, wanted) <= 1e-6

    def test_half_precision(self) -> None:
        model = self.model()
        given = self.inputs(2, self.length)
        exact = self.run(model, given)
        half = copy.deepcopy(model).to(torch.bfloat16)
        cut = {
            name: one.bfloat16() if one.is_floating_point() else one for name, one in given.items()
        }
        stock = self.off(self.run(half, cut).float(), exact)
        with ab.fuse(half, quiet=True, measure=False):
            found = self.run(half, cut)
        assert found.dtype == torch.bfloat16
        assert self.off(found.float(), exact) <= 1.5 * stock + 1e-2

    def test_undone(self) -> None:
        model = self.model()
        given = self.inputs(2, self.length)
        # After a first forward: some models keep lengths or caches of it.
        wanted = self.run(model, given)
        before = state(model)
        with contextlib.suppress(NoSuchError), ab.fuse(model, quiet=True, measure=False):
            assert state(model).keys() != before.keys()
            self.run(model, given)
            raise NoSuchError
        same(before, state(model))
        assert torch.equal(self.run(model, given), wanted)
        ab.fuse(model, quiet=True, measure=False)
        with pytest.raises(AttnbiasError, match="fused already"):
            ab.fuse(model, quiet=True)
        ab.fuse.undo(model)  # type: ignore[attr-defined]
        same(before, state(model))

    def test_copied(self) -> None:
        model = self.model()
        given = self.inputs(2, self.length)
        with ab.fuse(model, quiet=True, measure=False):
            wanted = self.run(model, given)
            other = copy.deepcopy(model)
            with torch.no_grad():
                for one in model.parameters():
                    one.zero_()
            assert torch.equal(self.run(other, given), wanted)
