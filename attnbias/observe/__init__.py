"""See: statistics of a model's attention, streamed, one small class each."""

from __future__ import annotations

from attnbias._room import callable_room
from attnbias.observe import corpus, statistics
from attnbias.observe.observer import observe
from attnbias.observe.seen import Labelled, Seen
from attnbias.observe.table import Row, Table

__all__ = ["Labelled", "Row", "Seen", "Table", "corpus", "observe", "statistics"]


callable_room(__name__, observe)
