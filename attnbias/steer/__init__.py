"""Shift the attention of a trained model, without training: ``ab.steer(model, rule, ...)``."""

from __future__ import annotations

from attnbias._room import callable_room
from attnbias.steer import rules
from attnbias.steer.attempts import Candidate
from attnbias.steer.branch import Branch, Lane
from attnbias.steer.context import steer
from attnbias.steer.hidden import HiddenCall, TokenCall
from attnbias.steer.hooks import Tokens, Vectors
from attnbias.steer.loop import Loop
from attnbias.steer.masses import masses
from attnbias.steer.recipe import Recipe
from attnbias.steer.rule import Rule
from attnbias.steer.site import SiteCall
from attnbias.steer.spans import Range
from attnbias.steer.step import Step
from attnbias.steer.wiring import BlockCall, Wired

__all__ = [
    "BlockCall",
    "Branch",
    "Candidate",
    "HiddenCall",
    "Lane",
    "Loop",
    "Range",
    "Recipe",
    "Rule",
    "SiteCall",
    "Step",
    "TokenCall",
    "Tokens",
    "Vectors",
    "Wired",
    "masses",
    "rules",
    "steer",
]

callable_room(__name__, steer)
