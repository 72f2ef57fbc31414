"""Rules and statistics that other packages add, found by their entry points.

A package adds a rule by an entry point in the group `attnbias.rules`, a statistic in
`attnbias.statistics`; the name is what recipes and the command line call it:

    [project.entry-points."attnbias.rules"]
    MyRule = "my_package.rules:MyRule"

Nothing is loaded at `import attnbias`: a plugin is imported when its name is first asked for.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar, cast

from attnbias.errors import AttnbiasError

GROUPS = ("attnbias.rules", "attnbias.statistics")
Kind = TypeVar("Kind", bound=type)


def names(group: str) -> tuple[str, ...]:
    """The names that installed packages add to a group, sorted; nothing is imported."""
    return tuple(sorted({point.name for point in _points(group)}))


def load(group: str, name: str, kind: Kind) -> Kind | None:
    """The class that an installed package adds under `name`, or None when no package does.

    Args:
        group: one of `GROUPS`.
        name: the entry point's name.
        kind: the class that every member of the group derives from.

    Raises:
        AttnbiasError: two packages claim the name, the plugin cannot be imported, or what it
            names is not a subclass of `kind`.
    """
    found = [point for point in _points(group) if point.name == name]
    if not found:
        return None
    if len({point.value for point in found}) > 1:
        owners = ", ".join(sorted(_owner(point) for point in found))
        raise AttnbiasError(f"{group}: more than one package adds {name!r} ({owners}); remove one")
    point = found[0]
    try:
        loaded = point.load()
    except Exception as error:  # a plugin may fail in any way; the user needs to know whose it is
        raise AttnbiasError(
            f"{group}: {name!r} of {_owner(point)} ({point.value}) cannot be imported: {error}"
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, kind)):
        raise AttnbiasError(
            f"{group}: {name!r} of {_owner(point)} is {loaded!r}, expected a subclass of "
            f"{kind.__module__}.{kind.__qualname__}"
        )
    return cast("Kind", loaded)


def _points(group: str) -> list[EntryPoint]:
    if group not in GROUPS:
        raise AttnbiasError(f"no plugin group {group!r}, expected one of {', '.join(GROUPS)}")
    return list(entry_points(group=group))


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unnamed package"
