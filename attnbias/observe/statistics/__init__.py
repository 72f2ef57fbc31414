"""The statistics: one small class per file. Another package can add one (see `Statistic`)."""

from __future__ import annotations

from attnbias.observe.grid import Grid
from attnbias.observe.registry import available, by_name
from attnbias.observe.scene import Scene
from attnbias.observe.statistic import Gathered, State, Statistic
from attnbias.observe.statistics.aligned import Aligned
from attnbias.observe.statistics.at import At
from attnbias.observe.statistics.distance import Distance
from attnbias.observe.statistics.entropy import Entropy
from attnbias.observe.statistics.first_token import FirstToken
from attnbias.observe.statistics.future_influence import FutureInfluence
from attnbias.observe.statistics.given import Given
from attnbias.observe.statistics.grid_distance import GridDistance
from attnbias.observe.statistics.hops import Hops
from attnbias.observe.statistics.offset import Offset
from attnbias.observe.statistics.peak import Peak
from attnbias.observe.statistics.received import Received
from attnbias.observe.statistics.share import Share
from attnbias.observe.statistics.sink_rate import SinkRate
from attnbias.observe.statistics.windowed_distance import WindowedDistance
from attnbias.observe.tiles import Tile

BUILTIN = (
    "Received",
    "Entropy",
    "FirstToken",
    "SinkRate",
    "Distance",
    "Share",
    "Offset",
    "At",
    "Peak",
    "Given",
    "GridDistance",
    "Aligned",
    "Hops",
    "WindowedDistance",
    "FutureInfluence",
)

__all__ = [
    "BUILTIN",
    "Aligned",
    "At",
    "Distance",
    "Entropy",
    "FirstToken",
    "FutureInfluence",
    "Gathered",
    "Given",
    "Grid",
    "GridDistance",
    "Hops",
    "Offset",
    "Peak",
    "Received",
    "Scene",
    "Share",
    "SinkRate",
    "State",
    "Statistic",
    "Tile",
    "WindowedDistance",
    "available",
    "by_name",
]
