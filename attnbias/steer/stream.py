"""The hidden states of a model in a `steer` context: where rules read, edit and extend them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from attnbias.errors import AttnbiasError, Refused
from attnbias.hub.layers import Parts, layers
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
        self.terms: dict[Site, dict[str, Tensor]] = {}
        self.checked: set[Site] = set()
        self.first = {site.tower: site for site in reversed(self.parts)}
        self.last = {site.tower: site for site in self.parts}

    @property
    def editors(self) -> list[Editing]:
        return [one for one in self.session.participants if one.role == "edit"]

    def begin(self) -> None:
        """Forget the forward before."""
        for kept in (self.inputs, self.turns, self.added, self.visited, self.terms):
            kept.clear()

    def see(self, call: Call) -> None:
        """An attention call: it knows positions and phase of its layer's tokens."""
        if call.site in self.parts:
            batch, _, queries, _ = call.query.shape
            self.turns[call.site] = Turn(batch, queries, call.query_positions, call.phase)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Room for another forward inside this one (a branch), whose hidden states are its own."""
        kept = self.inputs, self.turns, self.added, self.visited, self.terms
        self.inputs, self.turns, self.added, self.visited, self.terms = {}, {}, {}, set(), {}
        try:
            yield
        finally:
            self.inputs, self.turns, self.added, self.visited, self.terms = kept

    # Edits ----------------------------------------------------------------------------------------

    def edit(self, parts: Parts, place: str, tensor: Tensor) -> Tensor | None:
        """Hidden states after every rule's `hidden`, None where no rule changes them."""
        site = parts.site
        self.visited.add((site, place))
        turn = self.turns.get(site)
        if turn is None:
            return None  # the layer did not attend in this forward
        drops = self.session.drops
        left = None if drops is None or place != "layer" else drops.left(site)
        if left is not None:  # between layers all tokens are there
            turn = turn._replace(queries=left.length, positions=left.positions)
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
                    hidden.shape[1] - (0 if added is None else added.count),
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
        if site == self.first[site.tower] or site.tower not in self.added:
            self.added[site.tower] = Added(hidden.shape[-2])
        added = self.added[site.tower]
        if added.hidden is not None:
            hidden = torch.cat([hidden, added.hidden], 1)
        for editor in self.editors:
            for number, rule in enumerate(editor.rules):
                if adds(rule) and rule.acts_in(site.tower, site.layer, "prefill"):
                    if hidden.ndim != 3:
                        raise Refused(
                            f"{site}: all images run as one row there, with masks or positions per "
                            "token, so no token can be added."
                        )
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
        causal = bool(getattr(parts.core, "is_causal", False))
        if not site.tower.startswith("vision") or causal or parts.placed:
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

    def term(self, parts: Parts, place: str, value: Tensor) -> None:
        """What a sub-block gives, until the layer's sum has been looked at once."""
        if parts.sums and parts.site not in self.checked and not parts.layer.training:
            self.terms.setdefault(parts.site, {})[place] = value.detach()

    def check_sum(self, parts: Parts, output: Tensor) -> None:
        """Raise `Refused` where the layer does more than add its two sub-blocks to its input."""
        terms = self.terms.pop(parts.site, {})
        if len(terms) < 2 or parts.site not in self.inputs:
            return
        self.checked.add(parts.site)
        before = self.inputs[parts.site]
        if self.session.drops is not None:
            before, output = (self.session.drops.cut(parts.site, one) for one in (before, output))
        wanted = before.detach() + terms["attention"] + terms["mlp"]
        close = 1e-3 if output.dtype in (torch.float32, torch.float64) else 5e-2
        off = float((output.detach() - wanted).abs().max())
        if not off <= close * float(wanted.abs().max()):
            raise Refused(
                f"{type(parts.layer).__name__} ({parts.site}) does not just add its attention and "
                "its MLP to its input, so what they add cannot be edited there; 'layer' can."
            )

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
    hidden = flow.inputs[call.site]
    if call.session.drops is not None:
        hidden = call.session.drops.cut(call.site, hidden)
    return _rows(hidden, turn, call.site)[0]


def doors(rule: Rule) -> tuple[str, ...]:
    """The places where a rule needs a hook."""
    whole = adds(rule) or rule.reads_hidden
    own = rule.places if rule.uses("hidden") else ()
    return tuple(dict.fromkeys((*own, *(("layer",) if whole else ()))))


def opened(rule: Rule, parts: Parts) -> tuple[str, ...]:
    """`doors`, with those that are needed to see that the sub-blocks are what they seem."""
    found = doors(rule)
    if parts.sums and {"mlp", "attention"} & set(found):
        found = tuple(dict.fromkeys((*found, "attention", "mlp", "layer")))
    return found


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
