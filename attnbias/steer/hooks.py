"""What hooks may return besides a bias, new shares or a tensor."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnbias.errors import AttnbiasError


@dataclass(frozen=True)
class Vectors:
    """Queries, keys and values of a rule's heads, edited; None: as they were.

    Args:
        query: ``(batch, heads, queries, dim)``. key, value: ``(batch, heads, keys, dim)``: one per
            query head of the rule, also where the model shares them among heads.
        extra_key, extra_value: ``(batch | 1, heads | 1, extra, dim)``: keys that every query of the
            rule's heads sees beside the model's own, such as an explicit sink. Reallocations leave
            their share alone, as they do with a sink logit.
    """

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    extra_key: Tensor | None = None
    extra_value: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.extra_key is None) != (self.extra_value is None):
            raise AttnbiasError("Vectors needs extra_key and extra_value together, got one alone.")


@dataclass(frozen=True)
class Tokens:
    """Tokens that a rule adds to a layer's input, or which of them it keeps.

    Args:
        append: ``(batch | 1, tokens, size)``, put after the last token. They go through every layer
            from this one on and are gone from everything that leaves the layers.
        keep: booleans ``(batch | 1, tokens)`` over the layer's tokens, as many True in every row.
            This layer and those after it run without the others, and their caches do not hold them.
            Between the layers and after them a dropped token's hidden state stays what it was.
    """

    append: Tensor | None = None
    keep: Tensor | None = None
