"""The one adapter to Hugging Face models: sites, calls, positions, spans, the support report."""

from __future__ import annotations

from attnbias.hub.adapter import Participant, Session, attach
from attnbias.hub.call import Call
from attnbias.hub.request import MaskRequest
from attnbias.hub.sites import Site, sites

__all__ = ["Call", "MaskRequest", "Participant", "Session", "Site", "attach", "sites"]
