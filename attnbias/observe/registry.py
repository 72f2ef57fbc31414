"""Statistics by name: our own, and those that other packages add."""

from __future__ import annotations

from importlib import metadata

from attnbias.errors import AttnbiasError
from attnbias.observe.statistic import Statistic

GROUP = "attnbias.statistics"


def builtin() -> dict[str, type[Statistic]]:
    """The statistics of this library by name."""
    from attnbias.observe import statistics

    kinds = (getattr(statistics, word) for word in statistics.BUILTIN)
    return {kind.name: kind for kind in kinds}


def _added() -> dict[str, metadata.EntryPoint]:
    own = builtin()
    return {p.name: p for p in metadata.entry_points(group=GROUP) if p.name not in own}


def available() -> list[str]:
    """All names, ours first. Nothing of another package is imported."""
    return [*builtin(), *sorted(_added())]


def by_name(name: str) -> type[Statistic]:
    """The class of a statistic.

    Other packages add one with an entry point of the group ``attnbias.statistics`` whose name is
    the name of the statistic; it is imported when it is asked for. A name of ours cannot be taken.
    """
    own = builtin()
    if name in own:
        return own[name]
    point = _added().get(name)
    if point is None:
        raise AttnbiasError(f"no statistic is called {name!r}; there are {', '.join(available())}.")
    try:
        kind = point.load()
    except Exception as error:  # whatever another package raises at import
        raise AttnbiasError(
            f"the statistic {name!r} ({point.value}) cannot be loaded: "
            f"{type(error).__name__}: {error}."
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, Statistic)):
        raise AttnbiasError(
            f"the statistic {name!r} ({point.value}) must be a subclass of "
            f"attnbias.statistics.Statistic, got {kind!r}."
        )
    if kind.name != name:
        raise AttnbiasError(
            f"the entry point {name!r} ({point.value}) must carry the statistic's own name, "
            f"{kind.name!r}."
        )
    return kind


def resolve(wanted: object) -> list[Statistic]:
    """A list of statistics from objects, classes and names; labels must differ."""
    if isinstance(wanted, (str, Statistic, type)):
        wanted = [wanted]
    try:
        items = list(wanted)  # type: ignore[call-overload]
    except TypeError:
        raise AttnbiasError(
            f"statistics must be a list of statistics, got {type(wanted).__name__}."
        ) from None
    found = [_one(item) for item in items]
    if not found:
        raise AttnbiasError("statistics is empty; write observe(model, [statistics.Received()]).")
    labels = [s.label for s in found]
    for label in labels:
        if labels.count(label) > 1:
            raise AttnbiasError(
                f"statistics holds {label} {labels.count(label)} times; give it once."
            )
    return found


def _one(item: object) -> Statistic:
    if isinstance(item, str):
        item = by_name(item)
    if isinstance(item, type) and issubclass(item, Statistic):
        try:
            return item()
        except TypeError as error:
            raise AttnbiasError(f"{item.__name__} needs arguments: {error}.") from None
    if not isinstance(item, Statistic):
        raise AttnbiasError(
            "statistics takes objects such as statistics.Received(), or names "
            f"({', '.join(available())}), got {item!r}."
        )
    return item
