"""Statistics by name: our own, and those that other packages add."""

from __future__ import annotations

from attnbias import plugins
from attnbias.errors import AttnbiasError
from attnbias.observe.statistic import Statistic

GROUP = "attnbias.statistics"


def builtin() -> dict[str, type[Statistic]]:
    """The statistics of this library by name."""
    from attnbias.observe import statistics

    kinds = (getattr(statistics, word) for word in statistics.BUILTIN)
    return {kind.name: kind for kind in kinds}


def available() -> list[str]:
    """All names, ours first. Nothing of another package is imported."""
    own = builtin()
    return [*own, *(name for name in plugins.names(GROUP) if name not in own)]


def by_name(name: str) -> type[Statistic]:
    """The class of a statistic, by its name (``"first_token"``) or its class ("FirstToken").

    Other packages add one with an entry point of the group ``attnbias.statistics``; it is imported
    when its name is asked for. The names of ours cannot be taken.
    """
    own = builtin()
    for kind in own.values():
        if name in (kind.name, kind.__name__):
            return kind
    added = plugins.load(GROUP, name, Statistic)
    if added is None:
        raise AttnbiasError(f"no statistic is called {name!r}; there are {', '.join(available())}.")
    if not isinstance(getattr(added, "name", None), str) or added.name in own:
        raise AttnbiasError(
            f"the statistic {name!r} ({added.__module__}.{added.__qualname__}) must set `name` to "
            f"a word other than {', '.join(own)}."
        )
    return added


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
