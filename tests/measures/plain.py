"""Hidden states by plain PyTorch hooks on the blocks of a model, for dense routes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.steer.models import Subject


def blocks(model: nn.Module) -> nn.ModuleList:
    """The list of blocks of the language model, or of the only tower."""
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    }
    text = [name for name in lists if "language_model" in name]
    return lists[text[0] if text else next(iter(lists))]


def mlp(block: nn.Module) -> nn.Module:
    """The module of a block whose output is what its MLP adds."""
    names = {name for name, _ in block.named_modules()}
    return block.get_submodule("mlp" if "mlp" in names else "output.dense")


@torch.no_grad()
def states(
    subject: Subject, inputs: Mapping[str, Any] | None = None, *, of_mlp: bool = False
) -> Tensor:
    """(layers, batch, tokens, size) float64: the output of every block of a stock float64 twin.

    of_mlp: what its MLP adds, instead.
    """
    twin = copy.deepcopy(subject.model).double()
    twin.set_attn_implementation("sdpa")  # type: ignore[operator]
    found: list[Tensor] = []

    def keep(module: nn.Module, given: Any, out: Any) -> None:
        found.append(out[0] if isinstance(out, tuple) else out)

    for block in blocks(twin):
        (mlp(block) if of_mlp else block).register_forward_hook(keep)
    given = dict(inputs or subject.inputs)
    for name, value in given.items():
        given[name] = value.double() if value.is_floating_point() else value
    twin(**given)
    return torch.stack(found)
