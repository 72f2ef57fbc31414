"""How a problem is computed: one file per way, and the planner that chooses."""

from attnbias.lowering.planner import LOWERINGS, Explanation, choose, explanation, offers
from attnbias.lowering.problem import Lowering, Offer, Problem
from attnbias.lowering.traffic import counted

__all__ = [
    "LOWERINGS",
    "Explanation",
    "Lowering",
    "Offer",
    "Problem",
    "choose",
    "counted",
    "explanation",
    "offers",
]
