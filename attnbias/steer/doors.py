"""Hooks on the modules of a model's layers, one per module and side, for all contexts on it.

They are module-level functions that find what is in force at run time, as the adapter's are: a
compiled graph may keep them after a context has ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from attnbias.errors import Refused
from attnbias.hub.layers import Parts
from attnbias.hub.registry import outside_graphs
from attnbias.hub.request import MaskRequest
from attnbias.steer.stream import Flow, adds, doors, opened

if TYPE_CHECKING:
    from attnbias.hub import Session
    from attnbias.steer.context import Editing


@dataclass
class Door:
    """A hooked module: what it is to its layers, and for how many contexts."""

    module: nn.Module
    flow: Flow
    places: list[tuple[str, Parts]]
    handles: list[Any]
    users: int = 0


_DOORS: dict[int, Door] = {}


def _hidden_of(args: Any, kwargs: Any, module: nn.Module) -> Tensor:
    found = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(found, Tensor):
        raise Refused(f"{type(module).__name__} is not given its hidden states first.")
    return found


def _with_hidden(args: Any, kwargs: Any, hidden: Tensor) -> tuple[Any, Any]:
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}


def _unmasked(args: Any, kwargs: Any, parts: Parts) -> tuple[Any, Any]:
    """The layer's arguments for more tokens than its caller knows of.

    A mask that hides nothing goes; anything else that has one entry per token is refused.
    """

    def free(value: Any) -> Any:
        if isinstance(value, MaskRequest) and value.bias() is None:
            return None
        inner = value if isinstance(value, (tuple, list)) else (value,)
        if isinstance(value, MaskRequest) or any(isinstance(one, Tensor) for one in inner):
            raise Refused(
                f"{type(parts.layer).__name__} ({parts.site}) is given masks or positions per "
                "token, so no token can be added there."
            )
        return value

    if kwargs.get("is_causal"):
        raise Refused(f"{parts.site} is causal, so no token can be added there.")
    own = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    kept = {name: kwargs[name] for name in kwargs if name not in own}
    args = (*args[:1], *(free(value) for value in args[1:]))
    return args, {**kept, **{name: free(value) for name, value in own.items()}}


@outside_graphs
def _before(module: nn.Module, args: Any, kwargs: Any) -> Any:
    door = _DOORS.get(id(module))
    if door is None or door.module is not module:
        return None
    changed = False
    for place, parts in door.places:
        if place == "layer":
            old = _hidden_of(args, kwargs, module)
            new = door.flow.enter(parts, old)
            door.flow.inputs[parts.site] = new
            if new is not old:
                args, kwargs = _unmasked(args, kwargs, parts)
        elif place == "neurons":
            edited = door.flow.edit(parts, place, _hidden_of(args, kwargs, module))
            if edited is None:
                continue
            new = edited
        else:
            continue
        if new is not _hidden_of(args, kwargs, module):
            (args, kwargs), changed = _with_hidden(args, kwargs, new), True
    return (args, kwargs) if changed else None


@outside_graphs
def _after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    door = _DOORS.get(id(module))
    if door is None or door.module is not module:
        return None
    old = output[0] if isinstance(output, (tuple, list)) else output
    new = old
    for place, parts in door.places:
        if place == "neurons":
            continue
        if not isinstance(old, Tensor):
            raise Refused(f"{type(module).__name__} returns no tensor first: nothing to edit.")
        edited = door.flow.edit(parts, place, new)
        if place == "layer":
            door.flow.check_sum(parts, new)
        if edited is not None and place == "layer" and _recorded_inside(module):
            raise Refused(
                f"{parts.site}: this version of transformers records hidden states before they are "
                "edited: leave output_hidden_states out, or write pip install -U transformers."
            )
        new = new if edited is None else edited
        if place == "layer":
            door.flow.inputs.pop(parts.site, None)
            new = door.flow.leave(parts, new)
        else:
            door.flow.term(parts, place, new)
    if new is old:
        return None
    if isinstance(output, (tuple, list)):
        return type(output)([new, *output[1:]])
    return new


def _recorded_inside(module: nn.Module) -> bool:
    """Whether hidden states are recorded by a replaced forward, as in transformers 5.0."""
    code = getattr(module.forward, "__code__", None)
    return getattr(code, "co_name", "") == "wrapped_forward"


@outside_graphs
def _above(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """Recorded hidden states begin with the first layer's input, which has the added tokens."""
    door = _DOORS.get(id(module))
    if door is None or door.module is not module or not hasattr(output, "get"):
        return None
    states = output.get("hidden_states")
    if isinstance(states, (tuple, list)) and states:
        for _, parts in door.places:
            added = door.flow.added.get(parts.site.tower)
            if added is None or not added.count:
                continue
            longer = added.tokens + added.count
            output["hidden_states"] = tuple(
                one[:, : added.tokens] if one is not None and one.shape[1] == longer else one
                for one in states
            )
    return None


@contextmanager
def streaming(session: Session, editing: Editing) -> Iterator[None]:
    """Hooks for the rules of one context, for as long as it lasts.

    Raises:
        Refused: a layer without the place that a rule edits.
    """
    wanted = [rule for rule in editing.rules if doors(rule)]
    if not wanted:
        yield
        return
    for rule in wanted:
        if rule.towers is not None and any(tower.startswith("cross") for tower in rule.towers):
            raise Refused(
                f"{type(rule).__name__} edits hidden states, which cross-attention shares with its "
                "decoder: write towers=('decoder',)."
            )
    flow: Flow = session.flow if session.flow is not None else Flow(session)
    for rule in wanted:
        for site in session.sites:
            acts = any(rule.acts_in(site.tower, site.layer, p) for p in ("prefill", "decode"))
            if site.kind == "cross" or site in flow.parts or not acts:
                continue
            if rule.layers != "all" or site.tower not in flow.first:
                raise Refused(
                    f"{site} ({site.name}) is in no list of layers, so {type(rule).__name__} finds "
                    "no hidden states there."
                )
    keys: list[int] = []
    try:
        session.flow = editing.flow = flow
        for parts in flow.parts.values():
            site = parts.site
            for rule in wanted:
                if not any(rule.acts_in(site.tower, site.layer, p) for p in ("prefill", "decode")):
                    continue
                for place in opened(rule, parts):
                    keys.append(_open(parts.module(place), flow, place, parts))
                if adds(rule) and site == flow.first[site.tower]:
                    for module in parts.above:
                        if not isinstance(module, nn.ModuleList):
                            keys.append(_open(module, flow, "above", parts))
        yield
    finally:
        for key in reversed(keys):
            _close(key)


def _open(module: nn.Module, flow: Flow, place: str, parts: Parts) -> int:
    door = _DOORS.get(id(module))
    if door is None or door.module is not module:
        if place == "above":
            handles = [module.register_forward_hook(_above, with_kwargs=True, prepend=True)]
        else:
            # In front of the hooks that record hidden states: those must see the edited ones.
            handles = [
                module.register_forward_pre_hook(_before, with_kwargs=True),
                module.register_forward_hook(_after, with_kwargs=True, prepend=True),
            ]
        door = _DOORS[id(module)] = Door(module, flow, [], handles)
    door.users += 1
    if (place, parts) not in door.places:
        door.places.append((place, parts))
    return id(module)


def _close(key: int) -> None:
    door = _DOORS[key]
    door.users -= 1
    if not door.users:
        for handle in door.handles:
            handle.remove()
        del _DOORS[key]
