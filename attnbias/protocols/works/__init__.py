"""The protocols, one module per work, each with a `PROTOCOL`."""

from __future__ import annotations

import importlib
import pkgutil

from attnbias.errors import AttnbiasError
from attnbias.protocols.base import Protocol

_NAMES = sorted(found.name for found in pkgutil.iter_modules(__path__) if found.name[0] != "_")
PROTOCOLS: dict[str, Protocol] = {
    one.work: one
    for one in (importlib.import_module(f"{__name__}.{name}").PROTOCOL for name in _NAMES)
}


def protocol(work: str) -> Protocol:
    """The protocol of a work; AttnbiasError names the works that have one."""
    if work not in PROTOCOLS:
        raise AttnbiasError(
            f"no protocol for the work {work!r}, expected one of: {', '.join(PROTOCOLS)}"
        )
    return PROTOCOLS[work]
