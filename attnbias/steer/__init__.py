"""Shift the attention of a trained model, without training: ``ab.steer(model, rule, ...)``."""

from __future__ import annotations

from attnbias._room import callable_room
from attnbias.steer import rules
from attnbias.steer.context import steer
from attnbias.steer.hidden import HiddenCall, TokenCall
from attnbias.steer.hooks import Tokens, Vectors
from attnbias.steer.recipe import Recipe
from attnbias.steer.rule import Rule
from attnbias.steer.site import SiteCall
from attnbias.steer.spans import Range

__all__ = [
    "HiddenCall",
    "Range",
    "Recipe",
    "Rule",
    "SiteCall",
    "TokenCall",
    "Tokens",
    "Vectors",
    "rules",
    "steer",
]

callable_room(__name__, steer)
