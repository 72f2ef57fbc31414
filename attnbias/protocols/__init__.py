"""Protocols: what a work measured, to be run on your model and your data.

`attnbias reproduce ID --model M --data D` runs one: every item of a JSONL file is scored by the
plain model, under the work's rule and under a control of the same size. The result says what was
measured. It carries the mark "reproduced" only where the model, the data and the value are those of
the cited cell of the work's own table.
"""

from __future__ import annotations

from attnbias.protocols.base import Arm, Bench, Cell, Protocol
from attnbias.protocols.items import Items, read
from attnbias.protocols.kinds import KINDS, Kind
from attnbias.protocols.run import reproduce
from attnbias.protocols.works import PROTOCOLS, protocol

__all__ = [
    "KINDS",
    "PROTOCOLS",
    "Arm",
    "Bench",
    "Cell",
    "Items",
    "Kind",
    "Protocol",
    "protocol",
    "read",
    "reproduce",
]
