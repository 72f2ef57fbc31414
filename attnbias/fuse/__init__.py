"""Real models with an attention bias, made fast in one call: ``ab.fuse(model)``."""

from __future__ import annotations

from attnbias._room import callable_room
from attnbias.fuse.factors import Factors, Learned, learn
from attnbias.fuse.families import FAMILIES, register
from attnbias.fuse.family import Family, Place, Size
from attnbias.fuse.fused import Fused, LeftAlone, Sites, fuse, undo
from attnbias.fuse.trial import Gain

__all__ = [
    "FAMILIES",
    "Factors",
    "Family",
    "Fused",
    "Gain",
    "Learned",
    "LeftAlone",
    "Place",
    "Sites",
    "Size",
    "fuse",
    "learn",
    "register",
    "undo",
]

callable_room(__name__, fuse)
