"""The hidden states of a model in a `steer` context: where rules read, edit and extend them.

Hooks are module-level functions that find what is in force at run time, as the adapter's are: a
compiled graph may keep them after a context has ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError, Refused
from attnbias.hub.layers import Parts, layers
from attnbias.hub.registry import outside_graphs
from attnbias.hub.request import MaskRequest
from attnbias.steer.hidden import HiddenCall, TokenCall
from attnbias.steer.hooks import Tokens
from attnbias.steer.rule import Rule

if TYPE_CHECKING:
    from attnbias.hub import Call, Session, Site
    from attnbias.steer.context import Editing

_NOTHING = slice(0, 0)


class Turn(NamedTuple):
    """What an attention call says of the tokens of its layer."""

    batch: int
    queries: int
    positions: Tensor
    phase: str


@dataclass
class Added:
    """Tokens that rules have added to one tower in this forward.

    Attributes:
        tokens: how many the model itself has. hidden: the added ones between two layers.
        own: which of them each rule has added, by (id of the editor, number of the rule).
    """

    tokens: int
    count: int = 0
    hidden: Tensor | None = None
    own: dict[tuple[int, int], slice] = field(default_factory=dict)


class Flow:
    """Hidden states of one session's forwards."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.parts = layers(session.root)
        self.inputs: dict[Site, Tensor] = {}
        self.turns: dict[Site, Turn] = {}
        self.added: dict[str, Added] = {}
        self.visited: set[tuple[Site, str]] = set()
        self.first = {site.tower: site for site in reversed(self.parts)}
        self.last = {site.tower: site for site in self.parts}

    @property
    def editors(self) -> list[Editing]:
        return [one for one in self.session.participants if one.role == "edit"]

    def begin(self) -> None:
        """Forget the forward before."""
        for kept in (self.inputs, self.turns, self.added, self.visited):
            kept.clear()

    def see(self, call: Call) -> None:
        """An attention call: it knows positions and phase of its layer's tokens."""
        if call.site in self.parts:
            batch, _, queries, _ = call.query.shape
            self.turns[call.site] = Turn(batch, queries, call.query_positions, call.phase)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Room for another forward inside this one (a branch), whose hidden states are its own."""
        kept = self.inputs, self.turns, self.added, self.visited
        self.inputs, self.turns, self.added, self.visited = {}, {}, {}, set()
        try:
            yield
        finally:
            self.inputs, self.turns, self.added, self.visited = kept

    # Edits ----------------------------------------------------------------------------------------

    def edit(self, parts: Parts, place: str, tensor: Tensor) -> Tensor | None:
        """Hidden states after every rule's `hidden`, None where no rule changes them."""
        site = parts.site
        self.visited.add((site, place))
        turn = self.turns.get(site)
        if turn is None:
            return None  # the layer did not attend in this forward
        hidden, positions = _rows(tensor, turn, site)
        changed = False
        for editor in self.editors:
            for number, rule in enumerate(editor.rules):
                if not _edits(rule, place) or not rule.acts_in(site.tower, site.layer, turn.phase):
                    continue
                added = self.added.get(site.tower)
                own = _NOTHING if added is None else added.own.get((id(editor), number), _NOTHING)
                memory = editor.memories[number]
                call = HiddenCall(
                    site,
                    place,
                    turn.phase,
                    positions,
                    hidden.shape[0],
                    hidden.shape[1] if added is None else added.tokens,
                    own,
                    editor.spans,
                    memory,
                )
                new = rule.hidden(call, hidden)
                editor.effects[number].add("idle" if new is None else "changed")
                if new is not None:
                    hidden, changed = _checked(new, hidden, rule, "hidden"), True
        return hidden.reshape(tensor.shape) if changed else None

    def enter(self, parts: Parts, hidden: Tensor) -> Tensor:
        """A layer's input with the tokens that rules have added."""
        site = parts.site
        added = self.added.setdefault(site.tower, Added(hidden.shape[-2]))
        if added.hidden is not None:
            hidden = torch.cat([hidden, added.hidden], 1)
        for editor in self.editors:
            for number, rule in enumerate(editor.rules):
                if adds(rule) and rule.acts_in(site.tower, site.layer, "prefill"):
                    call = TokenCall(site, "prefill", editor.spans, editor.memories[number])
                    found = rule.tokens(call, hidden)
                    if found is not None:
                        editor.effects[number].add("changed")
                        hidden = self._append(parts, hidden, found, added, (id(editor), number))
        return hidden

    def _append(
        self, parts: Parts, hidden: Tensor, found: Tokens, added: Added, who: tuple[int, int]
    ) -> Tensor:
        more = found.append
        if more is None:
            return hidden
        site = parts.site
        if not site.tower.startswith("vision") or getattr(parts.core, "is_causal", False):
            raise Refused(
                f"{site}: tokens can be added where every token sees every token and none has a "
                "position of its own: towers of vision transformers."
            )
        if site != self.first[site.tower]:
            raise Refused(f"{site}: tokens can be added before the first layer of a tower only.")
        batch, length, size = hidden.shape
        if more.ndim != 3 or more.shape[0] not in (1, batch) or more.shape[2] != size:
            raise AttnbiasError(
                f"tokens to append must have the shape ({batch} or 1, count, {size}), got "
                f"{tuple(more.shape)}."
            )
        added.own[who] = slice(length, length + more.shape[1])
        added.count += more.shape[1]
        return torch.cat([hidden, more.to(hidden).expand(batch, -1, -1)], 1)

    def leave(self, parts: Parts, hidden: Tensor) -> Tensor:
        """A layer's output without the added tokens, which wait for the next layer."""
        added = self.added.get(parts.site.tower)
        if added is None or not added.count:
            return hidden
        last = parts.site == self.last[parts.site.tower]
        added.hidden = None if last else hidden[:, added.tokens :]
        return hidden[:, : added.tokens].contiguous()

    def required(self, rules: Iterable[Rule]) -> None:
        """Raise `Refused` where a layer attended in this forward and its hooks did not run."""
        for site, turn in self.turns.items():
            for rule in rules:
                if rule.acts_in(site.tower, site.layer, turn.phase):
                    for place in doors(rule):
                        if (site, place) not in self.visited:
                            raise Refused(
                                f"{site}: its hidden states never came by ({place}): a compiled "
                                "graph made without this edit runs; call torch.compiler.reset()."
                            )


def input_of(call: Call) -> Tensor:
    """The input ``(batch, queries, size)`` of the layer whose attention runs."""
    flow: Flow | None = call.session.flow
    if flow is None or call.site not in flow.inputs:
        raise AttnbiasError(
            f"{call.site}: the layer's input is kept for rules that set reads_hidden = True only."
        )
    turn = Turn(call.query.shape[0], call.query.shape[2], call.query_positions, call.phase)
    return _rows(flow.inputs[call.site], turn, call.site)[0]


def doors(rule: Rule) -> tuple[str, ...]:
    """The places where a rule needs a hook."""
    whole = adds(rule) or rule.reads_hidden
    own = rule.places if rule.uses("hidden") else ()
    return tuple(dict.fromkeys((*own, *(("layer",) if whole else ()))))


def adds(rule: Rule) -> bool:
    """Whether a rule appends tokens."""
    return rule.uses("tokens") and not rule.drops_tokens


def _edits(rule: Rule, place: str) -> bool:
    return place in rule.places and rule.uses("hidden")


def _rows(tensor: Tensor, turn: Turn, site: Site) -> tuple[Tensor, Tensor]:
    """Hidden states as ``(batch, tokens, size)`` with the positions of their tokens."""
    flat = tensor.ndim == 2 and tensor.shape[0] == turn.batch * turn.queries
    if flat:
        tensor = tensor.reshape(turn.batch, turn.queries, -1)
    elif tensor.ndim == 2:  # a vision tower that runs all images as one row
        tensor = tensor[None]
    if tensor.ndim != 3:
        raise Refused(f"{site}: hidden states of shape {tuple(tensor.shape)} cannot be edited.")
    if tensor.shape[1] == turn.queries and tensor.shape[0] == turn.batch:
        return tensor, turn.positions
    if not site.tower.startswith("vision"):
        raise Refused(
            f"{site} attends from {turn.batch} x {turn.queries} tokens, but its hidden states have "
            f"the shape {tuple(tensor.shape)}."
        )
    return tensor, torch.arange(tensor.shape[1], device=tensor.device)[None]


def _checked(new: object, old: Tensor, rule: Rule, hook: str) -> Tensor:
    if not isinstance(new, Tensor) or new.shape != old.shape:
        got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
        raise AttnbiasError(
            f"{type(rule).__name__}.{hook} must return the shape {tuple(old.shape)}, got {got}."
        )
    return new.to(old.dtype)


# Doors: one hook per module and side, shared by all contexts on it -------------------------------


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
        new = new if edited is None else edited
        if place == "layer":
            door.flow.inputs.pop(parts.site, None)
            new = door.flow.leave(parts, new)
    if new is old:
        return None
    if isinstance(output, (tuple, list)):
        return type(output)([new, *output[1:]])
    return new


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
    opened: list[int] = []
    try:
        session.flow = editing.flow = flow
        for parts in flow.parts.values():
            site = parts.site
            for rule in wanted:
                if not any(rule.acts_in(site.tower, site.layer, p) for p in ("prefill", "decode")):
                    continue
                for place in doors(rule):
                    opened.append(_open(parts.module(place), flow, place, parts))
                if adds(rule) and site == flow.first[site.tower]:
                    for module in parts.above:
                        if not isinstance(module, nn.ModuleList):
                            opened.append(_open(module, flow, "above", parts))
        yield
    finally:
        for key in reversed(opened):
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
