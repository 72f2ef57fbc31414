"""Which modules of a model are known, which carry a bias and are not, and why."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import cast

from torch import nn

from attnbias.fuse.families import FAMILIES
from attnbias.fuse.family import Family, Place
from attnbias.fuse.known import REFUSED
from attnbias.fuse.scan import biased, changed, replaced, shadowed
from attnbias.hub.sites import pretrained_class


@dataclass
class Found:
    """What `find` found: `places` with their families, and `left`: (class, reason) -> names."""

    places: dict[Place, Family] = field(default_factory=dict)
    left: dict[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)


def path_of(kind: type) -> str:
    """The dotted path of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def find(root: nn.Module) -> Found:
    """Walk a model."""
    known = {path: family for family in FAMILIES for path in family.modules}
    parts = {path for family in FAMILIES for path in family.parts}
    found = Found()
    for name, module, owner in _walk(root):
        for kind in type(module).__mro__:
            path = path_of(kind)
            if path in parts:
                if not _inside(name, found):
                    _leave(found, name, module, "it stands in no module that a family replaces.")
                break
            if path in known:
                place = Place(name, module, owner)
                reason = _reason(place, kind, known[path])
                if reason:
                    _leave(found, name, module, reason)
                else:
                    found.places[place] = known[path]
                break
            if path in REFUSED:
                _leave(found, name, module, REFUSED[path])
                break
        else:
            signs = biased(cast(Hashable, type(module)))
            if signs:
                said = f"its code speaks of {signs[0]}, and no family knows its class."
                _leave(found, name, module, said)
    return found


def _inside(name: str, found: Found) -> bool:
    """Whether a module stands below one that is replaced; those come first in the walk."""
    return any(not one.name or name.startswith(f"{one.name}.") for one in found.places)


def _leave(found: Found, name: str, module: nn.Module, reason: str) -> None:
    key = (type(module).__name__, reason)
    found.left[key] = (*found.left.get(key, ()), name)


def _reason(place: Place, kind: type, family: Family) -> str:
    names = ", ".join(changed(type(place.module), kind))
    if names:
        return f"it has {names} of its own, other than {kind.__name__}."
    names = ", ".join(replaced(kind))
    if names:
        return f"another library has replaced {names} of {kind.__name__}."
    names = ", ".join(shadowed(place.module))
    if names:
        return f"another library has replaced its {names}."
    return family.refuse(place)


def _walk(root: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Every module once, with the nearest pretrained model above it."""
    pretrained = pretrained_class()
    owners: dict[str, nn.Module] = {"": root}
    for name, module in root.named_modules():
        above = owners[name.rpartition(".")[0]] if name else root
        owners[name] = module if isinstance(module, pretrained) else above
        yield name, module, owners[name]
