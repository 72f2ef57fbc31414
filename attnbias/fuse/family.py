"""One family of attention modules: which classes it knows and how it makes them fast."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from attnbias.attention import attention, explain
from attnbias.bias import Bias, add
from attnbias.fuse import modes
from attnbias.fuse.position import PositionBias
from attnbias.hub.masks import asks_causal, mask_terms

if TYPE_CHECKING:
    from attnbias.fuse.door import Door

# What an attention function may be given that makes scores more than ``scale * q.k + bias``.
_OPAQUE = ("softcap", "indices", "block_indices", "cache")


@dataclass(frozen=True)
class Place:
    """A module that a family knows, and where it stands.

    Attributes:
        name: dotted path in the model. module: itself. owner: the nearest module above it (or
            itself) that is a pretrained model, else the root.
    """

    name: str
    module: nn.Module
    owner: nn.Module

    @property
    def config(self) -> Any:
        """The config of the module, or of its owner; None without one."""
        own = getattr(self.module, "config", None)
        return getattr(self.owner, "config", None) if own is None else own


@dataclass(frozen=True)
class Size:
    """What a module decides by whether the fused route pays.

    Attributes:
        batch, heads, queries, keys: lengths. training: whether gradients are needed.
        dtype, device: of queries.
    """

    batch: int
    heads: int
    queries: int
    keys: int
    training: bool
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, query: Tensor, key: Tensor) -> Size:
        """From ``(batch, heads, queries, dim)`` and ``(batch, key heads, keys, dim)``."""
        needs = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
        batch, heads, queries = query.shape[:3]
        return cls(batch, heads, queries, key.shape[2], needs, query.dtype, query.device)


class Family(ABC):
    """How one family of attention modules is computed with a structured bias.

    A family changes modules through a `Door` alone. Modules that call transformers' attention
    interface need no change of their own: their config names our function, which calls `attend`.
    Others get a forward of the family's.

    Attributes:
        name: short, for people. modules: dotted paths of the classes it knows.
        form: the bias in words. least: from how many scores of one head (queries * keys) on the
            fused route is taken; measured by ``python -m benchmarks.fuse``.
        parts: dotted paths of the classes of attention inside its modules, computed along with
            them.
        longest: the gain of one module is measured at no more than this length; None: at any.
        tokens: whether calls of one query (a decoded token) are taken, too.
    """

    name: ClassVar[str]
    modules: ClassVar[tuple[str, ...]]
    parts: ClassVar[tuple[str, ...]] = ()
    form: ClassVar[str]
    least: ClassVar[int] = 0
    longest: ClassVar[int | None] = None
    tokens: ClassVar[bool] = False

    def refuse(self, place: Place) -> str:
        """Why this module of a known class is left alone; empty where it is not."""
        return ""

    def kind(self, place: Place) -> object:
        """What tells modules of one class and shape apart, beyond their flags: each is checked."""
        return None

    @abstractmethod
    def prepare(self, place: Place, door: Door) -> None:
        """Plan the changes of one module."""

    @abstractmethod
    def example(
        self, place: Place, batch: int, length: int, generator: torch.Generator
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of one call of the module, for the check and the measurement.

        Made once with the model as it was and once fused, from the same random numbers: what the
        model makes in other ways (masks, position biases) is to be made as it makes it. A module
        of fixed length ignores `length`.
        """

    def output(self, found: Any) -> Tensor:
        """What the check compares of the output of a module: by default the first of a tuple."""
        out = found[0] if isinstance(found, tuple) else found
        assert isinstance(out, Tensor)
        return out

    def takes(self, size: Size) -> bool:
        """Whether a call of this size takes the fused route."""
        wanted = modes.route()
        if wanted is not None:
            return wanted == "fused"
        return size.device.type == "cpu" and size.queries * size.keys >= self.least

    # Modules that call the attention interface ---------------------------------------------------

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        original: str,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        position_bias: Any = None,
        is_causal: Any = None,
        **kwargs: Any,
    ) -> Tensor | None:
        """Output ``(batch, queries, heads, dim)`` of a call of the interface; None: stock code."""
        if opaque(kwargs):
            return None
        if not self.takes(Size.of(query, key)):
            return None
        causal = asks_causal(module, is_causal, original)
        terms = mask_terms(mask, query, key.shape[2], original, causal, type(module).__name__)
        if isinstance(position_bias, PositionBias):
            found = position_bias.bias
            terms += [] if found is None else [found]
        elif position_bias is not None:
            return None
        return compute(
            query, key, value, add(*terms) if terms else None, scale=scaling, dropout=dropout
        )


def opaque(kwargs: dict[str, Any]) -> bool:
    """Whether a call asks for what the fused route does not know."""
    return any(kwargs.get(name) is not None for name in _OPAQUE)


def compute(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Bias | None,
    *,
    scale: float | None = None,
    sink: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`attention`, as a model wants it: ``(batch, queries, heads, value dim)``."""
    seen = modes.record()
    if seen is not None:
        shape = explain(query, key, value, bias=bias, scale=scale, dropout=dropout)
        seen.append(("no bias" if bias is None else repr(bias), shape.chosen))
    out = attention(query, key, value, bias=bias, scale=scale, sink=sink, dropout=dropout)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous()
