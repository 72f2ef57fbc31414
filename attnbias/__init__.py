"""attnbias: compute, see, shift and build with biased attention.

Attention is a distribution over keys; a *bias* tilts it. The names that need transformers are
loaded when they are first used: ``import attnbias`` needs PyTorch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from attnbias import forms, radial
from attnbias.attention import attention, explain, merge
from attnbias.bias import (
    Bias,
    Bucketed,
    Causal,
    Decomposed,
    Dense,
    Distance,
    GridRelative,
    KeyBias,
    LowRank,
    MaskFunction,
    Neighborhood,
    Padding,
    QueryRelative,
    Relative,
    Segments,
    Window,
)
from attnbias.errors import AttnbiasError, Refused

if TYPE_CHECKING:
    from attnbias import measures
    from attnbias.fit import Fit, fit_factors, fit_svd

    # From the files that hold them: three of these are named like their file.
    from attnbias.fuse import Fused, fuse
    from attnbias.hub.prompt import prompt
    from attnbias.hub.sites import sites
    from attnbias.hub.spans import spans
    from attnbias.hub.support import Support, support
    from attnbias.observe import observe, statistics
    from attnbias.steer import Recipe, rules, steer

__version__ = "0.1.0"

_LAZY = {
    "Fit": "attnbias.fit",
    "fit_factors": "attnbias.fit",
    "fit_svd": "attnbias.fit",
    "Fused": "attnbias.fuse",
    "Recipe": "attnbias.steer",
    "Support": "attnbias.hub",
    "fuse": "attnbias.fuse",
    "measures": "attnbias.measures",
    "observe": "attnbias.observe",
    "prompt": "attnbias.hub",
    "rules": "attnbias.steer",
    "sites": "attnbias.hub",
    "spans": "attnbias.hub",
    "statistics": "attnbias.observe",
    "steer": "attnbias.steer",
    "support": "attnbias.hub",
}

__all__ = [
    "AttnbiasError",
    "Bias",
    "Bucketed",
    "Causal",
    "Decomposed",
    "Dense",
    "Distance",
    "Fit",
    "Fused",
    "GridRelative",
    "KeyBias",
    "LowRank",
    "MaskFunction",
    "Neighborhood",
    "Padding",
    "QueryRelative",
    "Recipe",
    "Refused",
    "Relative",
    "Segments",
    "Support",
    "Window",
    "attention",
    "explain",
    "fit_factors",
    "fit_svd",
    "forms",
    "fuse",
    "measures",
    "merge",
    "observe",
    "prompt",
    "radial",
    "rules",
    "sites",
    "spans",
    "statistics",
    "steer",
    "support",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'attnbias' has no attribute {name!r}")
    room = importlib.import_module(_LAZY[name])
    # `attnbias.observe` and `attnbias.steer` are rooms that can be called like the function they
    # hold.
    return room if room.__name__ == f"attnbias.{name}" else getattr(room, name)


def __dir__() -> list[str]:
    return sorted(__all__)
