"""The one adapter to Hugging Face models: sites, calls, positions, spans, the support report."""

from __future__ import annotations

from attnbias.hub.adapter import Participant, Session, attach
from attnbias.hub.call import Call
from attnbias.hub.prompt import Prompt, prompt
from attnbias.hub.request import MaskRequest
from attnbias.hub.sites import Site, sites
from attnbias.hub.spans import spans
from attnbias.hub.support import Layer, Support, support

__all__ = [
    "Call",
    "Layer",
    "MaskRequest",
    "Participant",
    "Prompt",
    "Session",
    "Site",
    "Support",
    "attach",
    "prompt",
    "sites",
    "spans",
    "support",
]
