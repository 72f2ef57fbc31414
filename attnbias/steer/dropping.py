"""Tokens that rules drop at a layer: it and the layers after it run without them.

Between layers hidden states keep their full length; a dropped token's stand still from the layer
where it was dropped. So everything outside the layers (norms, heads, recorded hidden states, hooks
on a layer) sees the shapes it knows, and inside a layer everything is shorter: hidden states,
positions, masks, and the keys that its cache holds.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError, Refused
from attnbias.hub.layers import Parts, layers
from attnbias.hub.registry import outside_graphs
from attnbias.hub.request import MaskRequest
from attnbias.hub.subset import subset_argument, subset_mask, take
from attnbias.steer.held import Held
from attnbias.steer.hidden import TokenCall
from attnbias.steer.hooks import Tokens

if TYPE_CHECKING:
    from attnbias.hub import Session, Site
    from attnbias.steer.context import Editing
    from attnbias.steer.rule import Rule


@dataclass
class Turn:
    """One tower's tokens in the forward that runs.

    Attributes:
        past: tokens before this forward. batch, length: of the full hidden states.
        positions: ``(batch | 1, length)``, token positions. decoding: one token after others.
        alive: the tokens ``(batch, kept)`` that are left at the layer that runs; None: all.
    """

    past: int
    batch: int
    length: int
    positions: Tensor
    decoding: bool
    alive: Tensor | None = None


@dataclass
class Dropping:
    """Which tokens the layers of one session's model run on."""

    session: Session
    users: int = 0
    turns: dict[str, Turn] = field(default_factory=dict)
    undo: list[Callable[[], None]] = field(default_factory=list)
    visited: set[Site] = field(default_factory=set)
    before: Counter[Site] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.parts = layers(self.session.root)
        self.first = {site.tower: site for site in reversed(self.parts)}
        self.cached = {entry.site: entry.module for entry in self.session.found}

    def open(self) -> None:
        """Let every layer pass through `run`."""
        for parts in self.parts.values():
            layer = parts.layer
            old = vars(layer).get("forward")
            layer.forward = _door(self, parts, layer.forward)
            self.undo.append(lambda layer=layer, old=old: _restore(layer, old))  # type: ignore[misc]

    def close(self) -> None:
        while self.undo:
            self.undo.pop()()

    def begin(self) -> None:
        """A forward begins."""
        self.visited.clear()
        self.before = Counter(self.session.calls)

    def required(self) -> None:
        """Raise `Refused` where a layer attended in this forward without passing through `run`."""
        for site in self.parts:
            if self.session.calls[site] > self.before[site] and site not in self.visited:
                raise Refused(
                    f"{site}: its layer never came by: a compiled graph made without this edit "
                    "runs; call torch.compiler.reset()."
                )

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Room for another forward inside this one."""
        kept = self.turns
        self.turns = {}
        try:
            yield
        finally:
            self.turns = kept

    # For those who look at whole layers ----------------------------------------------------------

    def left(self, site: Site) -> Turn | None:
        """The tower's tokens where some of them are gone in the layer that runs, else None."""
        turn = self.turns.get(site.tower)
        return turn if turn is not None and turn.alive is not None else None

    def cut(self, site: Site, hidden: Tensor) -> Tensor:
        """Hidden states of all tokens, without those that the layer does not run on."""
        turn = self.left(site)
        whole = turn is None or hidden.shape[:2] != (turn.batch, turn.length)
        return hidden if whole else take(hidden, turn.alive, 1)  # type: ignore[union-attr, arg-type]

    # One layer ------------------------------------------------------------------------------------

    def run(self, parts: Parts, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A layer's forward on the tokens that are left."""
        site, what = parts.site, f"{type(parts.layer).__name__} ({parts.site})"
        self.visited.add(site)
        given = _named(forward, args, kwargs, what)
        hidden = given.get("hidden_states")
        if not isinstance(hidden, Tensor) or hidden.ndim != 3:
            return forward(**given)  # not a sequence of tokens; a rule that drops here is told so
        if given.get("encoder_hidden_states") is not None and any(
            drops(rule) for rule in self._rules()
        ):
            raise Refused(f"{what} also attends to an encoder: no token can be dropped there.")
        cache = _cache_of(given)
        if site == self.first[site.tower] or site.tower not in self.turns:
            self.turns[site.tower] = self._turn(given, hidden, cache, site)
        turn = self.turns[site.tower]
        self._decide(site, hidden, turn, what, cache)
        number = getattr(self.cached[site], "layer_idx", None)
        held = None if cache is None else Held(cache, number, turn.past, turn.batch, what)
        if turn.alive is None and (held is None or held.slots is None):
            return forward(**given)
        if parts.layer.training and getattr(parts.layer, "gradient_checkpointing", False):
            raise Refused(
                f"{what}: tokens cannot be dropped under gradient checkpointing; write "
                "model.gradient_checkpointing_disable()."
            )
        every = torch.arange(turn.length, device=hidden.device).expand(turn.batch, -1)
        alive = every if turn.alive is None else turn.alive
        rows = turn.past + alive
        columns, keys = (rows, rows.shape[1]) if held is None else held.join(rows)
        inner = dict(given)
        if turn.alive is not None:
            inner["hidden_states"] = take(hidden, alive, 1)
            for name, value in given.items():
                if name not in _OWN and not isinstance(value, MaskRequest):
                    inner[name] = subset_argument(name, value, alive, turn.length, what)
        if isinstance(given.get("cache_position"), Tensor):
            start = columns.shape[1] - rows.shape[1]
            inner["cache_position"] = torch.arange(start, columns.shape[1], device=rows.device)
        mask = given.get("attention_mask")
        if "attention_mask" in given:
            inner["attention_mask"] = subset_mask(mask, turn.past, rows, columns, keys, what)
        output = forward(**inner)
        if held is not None:
            held.keep(columns)
        if turn.alive is None:
            return output
        whole = isinstance(output, Tensor)
        short = output if whole else output[0]
        index = alive[..., None].expand(-1, -1, hidden.shape[-1])
        full = hidden.scatter(1, index, short)
        return full if whole else type(output)([full, *output[1:]])

    def _rules(self) -> Iterator[Rule]:
        for editor in self.session.participants:
            yield from editor.rules if editor.role == "edit" else ()

    def _turn(self, given: Any, hidden: Tensor, cache: Any, site: Site) -> Turn:
        batch, length, _ = hidden.shape
        mask = given.get("attention_mask")
        past = 0
        if cache is not None:
            number = getattr(self.cached[site], "layer_idx", None)
            past = int(cache.get_seq_length(number or 0))
        positions = torch.arange(past, past + length, device=hidden.device)[None]
        if isinstance(mask, MaskRequest):
            positions = mask.query_positions().to(hidden.device)
        return Turn(past, batch, length, positions, length == 1 and past > 0)

    def _decide(self, site: Site, hidden: Tensor, turn: Turn, what: str, cache: Any) -> None:
        phase = "decode" if turn.decoding else "prefill"
        for editor in self.session.participants:
            for number, rule in enumerate(editor.rules if editor.role == "edit" else ()):
                if not drops(rule) or not rule.acts_in(site.tower, site.layer, phase):
                    continue
                here, positions = hidden, turn.positions
                if turn.alive is not None:
                    here = take(hidden, turn.alive, 1)
                    positions = take(positions, turn.alive, 1)
                call = TokenCall(
                    site, phase, editor.spans, editor.memories[number], positions, turn.batch
                )
                found = rule.tokens(call, here)
                keep = None if found is None else _checked(found, rule, positions, here)
                if keep is None or bool(keep.all()):
                    editor.effects[number].add("idle")
                    continue
                if site == self.first[site.tower] and cache is not None:
                    raise Refused(
                        f"{what}: tokens can be dropped from the second layer on, since the model "
                        "reads the length of its text from the cache of its first."
                    )
                editor.effects[number].add("changed")
                order = keep.nonzero()[:, 1].view(turn.batch, -1)
                turn.alive = order if turn.alive is None else turn.alive.gather(1, order)


_OWN = ("hidden_states", "attention_mask", "cache_position", "past_key_values", "past_key_value")


def drops(rule: Rule) -> bool:
    """Whether a rule drops tokens."""
    return rule.drops_tokens and rule.uses("tokens")


def _cache_of(given: dict[str, Any]) -> Any:
    cache = given.get("past_key_values")
    cache = given.get("past_key_value") if cache is None else cache
    if cache is not None and hasattr(cache, "self_attention_cache"):
        cache = cache.self_attention_cache
    return cache


def _named(forward: Callable[..., Any], args: Any, kwargs: Any, what: str) -> dict[str, Any]:
    """The arguments by name."""
    names = list(inspect.signature(forward).parameters)
    if len(args) > len(names):
        raise Refused(f"{what} takes arguments without names, so no token can be dropped there.")
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _checked(found: Tokens, rule: Rule, positions: Tensor, hidden: Tensor) -> Tensor | None:
    """What is kept ``(batch, tokens)``."""
    name, keep = type(rule).__name__, found.keep
    if found.append is not None:
        raise AttnbiasError(f"{name}.tokens must drop or append tokens, not both.")
    if keep is None:
        return None
    batch, length, _ = hidden.shape
    if keep.dtype != torch.bool or keep.shape not in ((batch, length), (1, length)):
        raise AttnbiasError(
            f"{name}.tokens: keep must be booleans ({batch} or 1, {length}), got "
            f"{keep.dtype} {tuple(keep.shape)}."
        )
    keep = keep.to(hidden.device).expand(batch, -1)
    counts = keep.sum(1)
    if int(counts.min()) != int(counts.max()):
        raise Refused(
            f"{name} keeps {', '.join(map(str, counts.tolist()))} tokens in the rows of one batch: "
            "rows must keep the same number; run them one by one."
        )
    order = torch.arange(length, device=hidden.device)
    last = torch.where((positions >= 0).expand(batch, -1), order, -1).amax(-1)
    if not bool((keep.gather(1, last.clamp(min=0)[:, None])[:, 0] | (last < 0)).all()):
        raise AttnbiasError(f"{name}.tokens drops the last token of a row, which must be kept.")
    return keep


def _door(dropping: Dropping, parts: Parts, forward: Callable[..., Any]) -> Callable[..., Any]:
    @outside_graphs
    def run(*args: Any, **kwargs: Any) -> Any:
        return dropping.run(parts, forward, args, kwargs)

    run.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return run


def _restore(layer: nn.Module, old: Any) -> None:
    if old is None:
        del layer.forward
    else:
        layer.forward = old


@contextmanager
def dropping(session: Session, editing: Editing) -> Iterator[None]:
    """The way through `Dropping.run` for as long as rules that drop tokens are in force."""
    if not any(drops(rule) for rule in editing.rules):
        yield
        return
    found: Dropping = session.drops if session.drops is not None else Dropping(session)
    if not found.users:
        found.open()
    session.drops = editing.drops = found
    found.users += 1
    try:
        yield
    finally:
        found.users -= 1
        if not found.users:
            found.close()
            session.drops = None
