"""Next-token scores: what a rule's `logits` sees, and how its answer reaches the caller."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError, Refused
from attnbias.steer.branch import Lane
from attnbias.steer.record import Record, arguments, chunk_of, real_tokens
from attnbias.steer.spans import Keys, Spans

if TYPE_CHECKING:
    from attnbias.hub import Session, Site
    from attnbias.steer.context import Editing
    from attnbias.steer.edit import Memory
    from attnbias.steer.rule import Rule

T = TypeVar("T")


class Step:
    """The scores of the next token after one forward, as a rule sees them.

    Attributes:
        logits: ``(batch, vocabulary)``, at the last real token of each row, in float32 (float64).
        number: 0 after the prompt, then 1, 2, ... after each decoding step.
        tokens: ``(batch, length)``, all tokens so far; None where the caller gave embeddings.
        positions: ``(batch, length)``, their absolute positions, -1 at padding.
        looked: what this rule's `look` returned in this forward, by site.
    """

    def __init__(
        self, logits: Tensor, record: Record, spans: Spans, memory: Memory, lane: Any
    ) -> None:
        self.logits = logits
        self._record, self._spans, self._memory, self._lane = record, spans, memory, lane

    @property
    def number(self) -> int:
        return self._record.steps

    @property
    def tokens(self) -> Tensor | None:
        return self._record.ids

    @property
    def positions(self) -> Tensor:
        return self._record.positions

    @property
    def looked(self) -> dict[Site, Any]:
        return self._memory.looked

    def where(self, keys: Keys) -> Tensor:
        """Which tokens are chosen: bool ``(batch, length)``. Padding is never chosen."""
        return self._spans.chosen(keys, self.positions, self._record.batch)

    def has(self, name: str) -> bool:
        """Whether a span of that name was given."""
        return name in self._spans

    def branch(self, name: str) -> Lane:
        """A branch, run up to this step: its ``logits`` and what this rule `looked` at there."""
        lane: Lane = self._lane(name)
        lane.follow(self)
        return lane

    def frozen(self, name: str, make: Callable[[], T]) -> T:
        """What `make` returned after the prompt: kept for the steps that follow.

        Raises:
            Refused: decoding from a cache that was filled before the context was entered.
        """
        kept = self._record.frozen
        place = (id(self._memory), name)
        if self.number == 0:
            kept[place] = make()
        elif place not in kept:
            raise Refused(_UNSEEN)
        found: T = kept[place]
        return found


_UNSEEN = (
    "a rule follows a sequence from its prompt on, but this context saw only the steps after it: "
    "run the prefill inside the context too."
)
_REORDERED = (
    "a rule follows each sequence with a branch or with what it saw of its prompt, and beams "
    "change places between steps: use greedy decoding or sampling (num_beams=1)."
)


class Stepper:
    """Follows the sequences that a model is fed inside one context, and edits next-token scores."""

    def __init__(self, session: Session, editing: Editing) -> None:
        self.session, self.editing = session, editing
        self.records: WeakKeyDictionary[Any, Record] = WeakKeyDictionary()
        self.record: Record | None = None
        self._watched: WeakKeyDictionary[Any, None] = WeakKeyDictionary()

    # Around a forward -----------------------------------------------------------------------------

    def before(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        given = arguments(module, args, kwargs)
        chunk = chunk_of(given)
        self.record = None
        if chunk is None:
            return
        cache = given.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        real = real_tokens(given, chunk, past)
        position = given.get("position_ids")
        if isinstance(position, Tensor):  # several kinds of positions may come before the batch
            position = position.expand(*position.shape[:-2], real.shape[0], -1)
        record = self.records.get(cache) if cache is not None and past else None
        if record is None:
            record = Record([chunk], real[:, past:], position, module)
            if past:
                record.steps, record.trouble = 1, _UNSEEN
        else:
            if past < record.length:
                record.cut(past)
            elif past > record.length:
                record.trouble = _UNSEEN
            record.chunks.append(chunk)
            record.past, record.real = record.length, real
            if record.given is not None:
                record.given = None if position is None else torch.cat([record.given, position], -1)
            record.module = module
            record.version += 1
            if chunk.length == 1:
                record.steps += 1
        self.record = record

    def after(self, module: nn.Module, output: Any) -> Any:
        record = self.record
        if record is None:
            return output
        cache = getattr(output, "past_key_values", None)
        record.cache = None if cache is None else ref(cache)
        if cache is not None:
            self.records[cache] = record
            self._watch(cache, record)
        for number, rule in enumerate(self.editing.rules):
            if rule.uses("logits") and rule.phase in ("both", record.phase):
                output = self._edit(output, record, number, rule)
        return output

    def close(self) -> None:
        """Take everything off the caller's caches again."""
        for cache in list(self._watched):
            vars(cache).pop("reorder_cache", None)

    def _watch(self, cache: Any, record: Record) -> None:
        """Beams change the order of rows in a cache: notice it."""
        if cache not in self._watched and hasattr(cache, "reorder_cache"):
            self._watched[cache] = None
            cache.reorder_cache = Reordering(cache, record)

    # Scores ---------------------------------------------------------------------------------------

    def _edit(self, output: Any, record: Record, number: int, rule: Rule) -> Any:
        logits = _logits(output)
        name = type(rule).__name__
        if not isinstance(logits, Tensor) or logits.ndim != 3:
            raise Refused(
                f"{name} edits next-token scores, and the model returns none (batch, tokens, "
                "vocabulary): load it with its language-model head."
            )
        tokens = record.length - record.past
        place = record.last - (tokens - logits.shape[1])  # the caller may keep the last scores only
        rows = place >= 0
        if not bool(rows.any()):
            return output
        index = place.clamp(min=0)[:, None, None].expand(-1, 1, logits.shape[2])
        index = index.to(logits.device)
        old = logits.gather(1, index)[:, 0]
        kind = old.dtype if old.dtype == torch.float64 else torch.float32
        memory = self.editing.memories[number]
        lane = partial(self.lane, number)
        step = Step(old.to(kind), record, self.editing.spans, memory, lane)
        new = rule.logits(step)
        self.editing.effects[number].add("idle" if new is None else "changed")
        if new is None:
            return output
        if not isinstance(new, Tensor) or new.shape != old.shape:
            got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise AttnbiasError(
                f"{name}.logits must return the shape {tuple(old.shape)}, got {got}."
            )
        kept = torch.where(rows.to(old.device)[:, None], new.to(old.dtype), old)
        return _with_logits(output, logits.scatter(1, index, kept[:, None]))

    def lane(self, number: int, name: str) -> Lane:
        """The own sequence of one rule's branch beside the main sequence of this forward."""
        record, rule = self.record, self.editing.rules[number]
        if name not in rule.branches:
            raise AttnbiasError(
                f"{type(rule).__name__} has no branch {name!r}, it has {list(rule.branches)}."
            )
        if record is None:
            raise Refused(f"{type(rule).__name__} has a branch, which needs input_ids.")
        if record.trouble:
            raise Refused(f"{type(rule).__name__}: {record.trouble}")
        key = (number, name)
        if key not in record.lanes:
            record.lanes[key] = Lane(self, record, number, name)
        return record.lanes[key]


@contextmanager
def stepping(session: Session, editing: Editing) -> Iterator[None]:
    """Follow the sequences of a context whose rules edit next-token scores or have branches."""
    if not any(rule.uses("logits") or rule.branches for rule in editing.rules):
        yield
        return
    stepper = editing.stepper = Stepper(session, editing)
    for number, memory in enumerate(editing.memories):
        memory.branch = partial(stepper.lane, number)
    try:
        yield
    finally:
        stepper.close()


class Reordering:
    """A cache's `reorder_cache` that tells the record first."""

    def __init__(self, cache: Any, record: Record) -> None:
        self._cache, self._record = ref(cache), ref(record)

    def __call__(self, order: Tensor) -> None:
        record, cache = self._record(), self._cache()
        if record is not None:
            record.trouble = _REORDERED
        if cache is not None:
            type(cache).reorder_cache(cache, order)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        other = memo.get(id(self._cache()))  # a copied cache has its own method
        return None if other is None else MethodType(type(other).reorder_cache, other)


def _logits(output: Any) -> Any:
    if isinstance(output, tuple) and not hasattr(output, "logits"):
        return next((one for one in output if isinstance(one, Tensor) and one.ndim == 3), None)
    return getattr(output, "logits", None)


def _with_logits(output: Any, logits: Tensor) -> Any:
    if isinstance(output, tuple) and not hasattr(output, "logits"):
        old = _logits(output)
        return tuple(logits if one is old else one for one in output)
    output = copy(output)
    output["logits"] = logits
    return output
