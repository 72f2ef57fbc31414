"""ReGround: gated self-attention beside cross-attention instead of before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from attnbias.errors import AttnbiasError
from attnbias.steer.rule import Heads, Rule, Towers, is_number
from attnbias.steer.wiring import BlockCall, Wired

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ReGround(Rule):
    r"""Let cross-attention in a GLIGEN model read what stood before gated self-attention.

    .. math:: \text{out} = x + \beta_t\, \Delta_G(x) + \mathrm{CA}(x, c)
        \quad\text{instead of}\quad
        y = x + \beta_t\, \Delta_G(x), \;\; \text{out} = y + \mathrm{CA}(y, c)

    with x the features after self-attention, :math:`\Delta_G(x)` what gated self-attention over the
    boxes adds to them, and c the prompt. So the boxes no longer change what the patches ask of the
    prompt in the same block. No weight changes; at :math:`\beta_t = 0` both are the model without
    boxes.

    Args:
        parallel: False keeps the order of GLIGEN, for the schedule alone.
        gamma: share of the denoising, from noise on, in which the boxes act (1: all of it, the
            published headline); after it :math:`\beta_t = 0`.
        steps: timesteps that the model was trained with; step t counts as
            ``1 - (t + 1) / steps`` done.
        layers: blocks, by their cross-attention. heads has no meaning here.

    Cost: none; one subtraction less per block.

    Raises:
        Refused: a model without gated self-attention.
        AttnbiasError: gamma below 1 in a forward that is given no timestep.

    Source: ReGround: Improving Textual and Spatial Grounding at No Cost, 2024 (arXiv 2403.13589),
    equations as in the catalogue's reading of an unofficial re-implementation; that code adds the
    features a second time, since GLIGEN's module returns :math:`x + \Delta_G(x)`. Here the
    difference is taken. Chosen here: that the share of steps is read from the timestep, which is
    the same for schedules with even steps.
    """

    heads: Heads = "all"
    towers: Towers = ("cross",)
    parallel: bool = True
    gamma: float = 1.0
    steps: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.gamma <= 1:
            raise AttnbiasError(f"gamma must be from 0 to 1, got {self.gamma!r}.")
        if not is_number(self.steps) or self.steps < 1:
            raise AttnbiasError(f"steps must be a whole number from 1, got {self.steps!r}.")

    def wire(self, block: BlockCall, before: Tensor, after: Tensor) -> Wired | None:
        stream = after
        if self.gamma < 1:
            if block.timestep is None:
                raise AttnbiasError("ReGround with gamma below 1 needs the model's timestep.")
            # Timesteps count down: the first share has the large ones.
            active = block.timestep.to(before.device) >= (1 - self.gamma) * self.steps
            stream = after.where(active[:, None, None], before)
        if not self.parallel:
            return None if stream is after else Wired(stream, stream)
        return Wired(stream, before)
