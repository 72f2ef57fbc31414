"""BlockHeads beside plain hooks on the projections."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor

import attnbias as ab
from tests.cases.hook import HookCase
from tests.steer.models import Subject

HEADS = {0: (0, 3), 1: (2,)}


class TestBlockHeads(HookCase):
    __test__ = True
    zero: ClassVar[Any] = None
    small, large = "uniform", "zero"
    subjects: ClassVar[tuple[str, ...]] = ("stories", "mistral", "gpt_oss")
    padding: ClassVar[tuple[str, ...]] = ("stories",)

    def rule(self, strength: Any, **where: Any) -> ab.rules.BlockHeads:
        return ab.rules.BlockHeads(mode=strength, heads=HEADS, **where)

    @contextlib.contextmanager
    def oracle(self, subject: Subject, strength: Any, model: Any) -> Iterator[None]:
        def cut(tensor: Tensor, layer: int, size: int) -> Tensor:
            tensor = tensor.clone()
            for head in HEADS[layer]:
                tensor[..., head * size : (head + 1) * size] = 0
            return tensor

        handles = []
        for layer in HEADS:
            attention = model.model.layers[layer].self_attn
            size = attention.head_dim
            if strength == "zero":
                handles.append(
                    attention.o_proj.register_forward_pre_hook(
                        lambda _, args, layer=layer, size=size: (cut(args[0], layer, size),)
                    )
                )
            else:  # a query of zeros attends to all that it sees alike
                handles.append(
                    attention.q_proj.register_forward_hook(
                        lambda _, __, out, layer=layer, size=size: cut(out, layer, size)
                    )
                )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
