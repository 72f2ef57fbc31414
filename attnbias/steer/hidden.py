"""What a rule sees of the hidden states of one layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from attnbias.errors import Refused
from attnbias.steer.spans import Keys, Spans

if TYPE_CHECKING:
    from attnbias.hub import Site
    from attnbias.steer.edit import Memory

T = TypeVar("T")
_NOWHERE = torch.empty(1, 0, dtype=torch.long)


@dataclass(frozen=True)
class HiddenCall:
    """Hidden states of one layer in one forward, as a rule sees them.

    Attributes:
        site: the attention site of the layer. at: ``"layer"``, ``"mlp"``, ``"attention"`` or
            ``"neurons"``. phase: ``"prefill"`` or ``"decode"``.
        positions: ``(batch | 1, tokens)``, absolute token positions, -1 where there is no token.
        length: how many tokens the model itself has here; what rules have added comes after them.
        added: the tokens that this rule has appended (empty where it has none).
    """

    site: Site
    at: str
    phase: str
    positions: Tensor
    batch: int
    length: int
    added: slice
    spans: Spans
    memory: Memory

    @property
    def tower(self) -> str:
        return self.site.tower

    @property
    def layer(self) -> int:
        return self.site.layer

    def where(self, keys: Keys) -> Tensor:
        """Which tokens are chosen: bool ``(batch | 1, tokens)``. Padding is never chosen."""
        return self.spans.chosen(keys, self.positions, self.batch)

    def has(self, name: str) -> bool:
        """Whether a span of that name was given."""
        return name in self.spans

    @property
    def last(self) -> Tensor:
        """The number of the last real token of each row, ``(batch,)``; 0 where all is padding."""
        real = (self.positions >= 0).expand(self.batch, -1)
        order = torch.arange(real.shape[1], device=real.device)
        return torch.where(real, order, 0).amax(-1)

    def frozen(self, name: str, make: Callable[[], T]) -> T:
        """What `make` returned in the last prefill call here; made anew in each of them.

        Raises:
            Refused: decoding from a cache that was filled before the context was entered.
        """
        place = (self.site, self.at, name)
        if self.phase == "prefill":
            self.memory.frozen[place] = make()
        elif place not in self.memory.frozen:
            raise Refused(
                f"{self.site}: a rule decides on the prompt, but this context saw only the steps "
                "after it: run the prefill inside the context too."
            )
        found: T = self.memory.frozen[place]
        return found


@dataclass(frozen=True)
class TokenCall:
    """The tokens that enter one layer in one forward, as a rule sees them.

    Attributes:
        site: the attention site of the layer. phase: ``"prefill"`` or ``"decode"``.
        positions: ``(batch | 1, tokens)``, absolute token positions, -1 where there is no token;
            for rules that drop tokens. batch: rows.
    """

    site: Site
    phase: str
    spans: Spans
    memory: Memory
    positions: Tensor = _NOWHERE
    batch: int = 1

    @property
    def tower(self) -> str:
        return self.site.tower

    @property
    def layer(self) -> int:
        return self.site.layer

    def where(self, keys: Keys) -> Tensor:
        """Which tokens are chosen: bool ``(batch | 1, tokens)``. Padding is never chosen."""
        return self.spans.chosen(keys, self.positions, self.batch)

    @property
    def looked(self) -> dict[Site, Any]:
        """What this rule's `look` has returned in this forward so far, by site."""
        return self.memory.looked

    def has(self, name: str) -> bool:
        """Whether a span of that name was given."""
        return name in self.spans
