"""What a loop is asked for, what it tries, and where it can go back to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnbias.steer.caches import State

if TYPE_CHECKING:
    from attnbias.hub import Site


@dataclass(frozen=True)
class Request:
    """What a call of ``generate`` asked for, prepared by transformers.

    Attributes:
        model: the model that generates. config: the merged generation config.
        processors: its logits processors. stopping: its stopping criteria (length and eos too).
        stream: where accepted tokens go, ``(1,)`` at a time.
    """

    model: Any
    config: Any
    processors: Callable[[Tensor, Tensor], Tensor]
    stopping: Callable[[Tensor, Any], Tensor]
    stream: Callable[[Tensor], None] | None = None


@dataclass(frozen=True)
class Candidate:
    """A continuation of the tokens so far.

    Attributes:
        tokens: ``(count,)``; ends early where a stopping criterion held.
        looked: for each token what the rule's `look` returned in the forward that predicted it.
        stopped: whether it ends the text.
    """

    tokens: Tensor
    looked: tuple[dict[Site, Any], ...]
    stopped: bool
    state: State


@dataclass(frozen=True)
class Mark:
    """A point of the decoding to come back to."""

    state: State
    finished: bool
    random: Tensor


def random_state(device: torch.device, state: Tensor | None = None) -> Tensor:
    """The state of the device's generator, set to `state` where that is given."""
    if device.type == "cpu":
        if state is not None:
            torch.set_rng_state(state)
        return torch.get_rng_state()
    module = torch.get_device_module(device)
    if state is not None:
        module.set_rng_state(state, device)
    found: Tensor = module.get_rng_state(device)
    return found
