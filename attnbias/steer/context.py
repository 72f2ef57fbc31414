"""`steer`: rules in force on a model for the length of a `with` block."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from attnbias.errors import AttnbiasError, Refused
from attnbias.steer.engine import Active, Edited, Memory, edited
from attnbias.steer.rule import Rule
from attnbias.steer.spans import Spans

if TYPE_CHECKING:
    from attnbias.hub import Call, Site
    from attnbias.hub.prompt import Prompt
    from attnbias.steer.dropping import Dropping
    from attnbias.steer.step import Stepper
    from attnbias.steer.stream import Flow


class Editing:
    """The participant of one `steer` context: its rules and spans."""

    role = "edit"

    def __init__(self, rules: Sequence[Rule], spans: Mapping[str, Any] | None) -> None:
        self.rules, self.spans = tuple(rules), Spans(spans)
        self.effects: list[set[str]] = [set() for _ in self.rules]
        self.memories = [Memory() for _ in self.rules]
        self.flow: Flow | None = None  # the hidden states, where a rule reads or edits them
        self.stepper: Stepper | None = None  # branches and next-token scores
        self.sources: frozenset[str] = frozenset()  # towers that only feed another one
        self._towers: set[str] = set()  # those that the forward has called
        self.drops: Dropping | None = None  # which tokens layers run on
        self._ran = False
        self._acting: dict[Any, tuple[Active, ...]] = {}

    def begin_forward(self, forward: int) -> None:
        """What was looked at belongs to one forward; what is frozen stays.

        `generate` runs an image's tower alone, right before the forward that reads its features:
        what was looked at there stays for that one.
        """
        self._ran = True
        if not self._towers or not self._towers <= self.sources:
            for memory in self.memories:
                memory.looked.clear()
        self._towers.clear()
        if self.flow is not None:
            self.flow.begin()
        if self.drops is not None:
            self.drops.begin()

    def end_forward(self, forward: int) -> None:
        """Every hook that was set must have been called."""
        if self.flow is not None:
            self.flow.required(self.rules)
        if self.drops is not None:
            self.drops.required()

    def before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """What the caller feeds the model."""
        if self.stepper is not None:
            self.stepper.before(module, args, kwargs)

    def after_forward(self, module: nn.Module, output: Any) -> Any:
        """What the caller gets."""
        return output if self.stepper is None else self.stepper.after(module, output)

    def tell(self) -> None:
        """Warn of rules that had forwards to act on and met nothing to act on."""
        for rule, effects in zip(self.rules, self.effects, strict=True):
            if not self._ran or (effects and effects != {"missed"}):
                continue
            reason = (
                "none of its keys was there"
                if effects
                else f"no call had its layers, towers and phase {rule.phase!r}"
            )
            warnings.warn(f"{rule!r} changed nothing: {reason}.", UserWarning, stacklevel=4)

    def active(self, call: Call, only: int | None = None) -> tuple[Active, ...]:
        """The rules that act at this call, or only the rule of that number."""
        place = (call.site, call.phase, call.query.shape[1], self.spans, only)
        if place not in self._acting:
            self._acting[place] = tuple(self._active(call, only))
        return self._acting[place]

    def _active(self, call: Call, only: int | None) -> Iterator[Active]:
        site, total = call.site, call.query.shape[1]
        entries = zip(self.rules, self.effects, self.memories, strict=True)
        for number, (rule, effects, memory) in enumerate(entries):
            if only not in (None, number):
                continue
            if not rule.acts_in(site.tower, site.layer, call.phase) or not attends(rule):
                continue
            heads = rule.heads_in(site.tower, site.layer)
            if heads == "all":
                heads = tuple(range(total))
            if heads[-1] >= total:
                raise AttnbiasError(
                    f"{type(rule).__name__} names head {heads[-1]}, but {site} has heads 0 to "
                    f"{total - 1}."
                )
            yield Active(rule, heads, self.spans, effects, memory)

    @staticmethod
    def compute(call: Call, editors: Sequence[Any]) -> Edited:
        """What becomes of a call under the rules of all editors.

        Args:
            call: the attention call. editors: the `Editing` participants, outermost first.
        """
        for editor in editors:
            editor._towers.add(call.site.tower)
            if editor.flow is not None:
                editor.flow.see(call)
        active = [item for editor in editors for item in editor.active(call)]
        return edited(call, active) if active else Edited(None, None, call)


@contextmanager
def steer(
    model: nn.Module,
    *rules: Rule,
    spans: Mapping[str, Any] | None = None,
    prompt: Prompt | None = None,
) -> Iterator[None]:
    r"""Shift the attention of a trained model while the block runs.

    .. math:: p'_{ij} \propto p_{ij}\, e^{\sum_r B^r_{ij}} \prod_r m'^r_{i g(j)} / m^r_{i g(j)}

    Works under ``generate`` with any cache, padding on either side, sampling, several sequences and
    beams (rules on next-token scores, with branches or with a loop refuse beams). Contexts nest:
    biases add up, reallocations run outer first. Heads, rows and queries that no rule changes are
    the model's own output bit for bit, and so is the model afterwards, also after an exception.

    Args:
        model: a transformers model whose attention goes through its attention interface.
        rules: the rules, in order.
        spans: named token positions for rules that need them, as in ``ab.prompt(...).spans``:
            ``name -> (start, stop)``, or a list of these with one per row of the batch.
            "first" is always known.
        prompt: what ``ab.prompt`` made: its spans are known (those of `spans` come first), and
            rules that measure each prompt (`Rule.prepare`) do so now.

    Cost: biases per key and new queries ride in the model's own call (sdpa on CPU, without
    gradients); the groups of a reallocation go over each key about once, beside the plain output
    where all but one are few keys. Elsewhere one attention call on the chosen heads for any number
    of biases, two more for each reallocation, and the plain call too where some rows are left
    alone.

    Warns:
        UserWarning: at the end, for a rule that met none of its keys, layers or phase in any call.

    Raises:
        AttnbiasError: an unknown layer, head, tower or span; something that is not a rule.
        Refused: a rule that must be fitted first, a model that cannot be edited.
    """
    from attnbias.hub import attach, sites
    from attnbias.steer.doors import streaming
    from attnbias.steer.dropping import dropping
    from attnbias.steer.gate import gate
    from attnbias.steer.step import stepping
    from attnbias.steer.wiring import wiring

    if not rules:
        raise AttnbiasError("steer needs at least one rule, as in ab.rules.KeyShift(...).")
    rules, spans = _prompted(model, _checked(rules), spans, prompt)
    editing = Editing(rules, spans)
    places = sites(model)
    towers = {site.tower for site in places}
    fed = {tower for tower in towers if tower.startswith(("vision", "audio"))}
    editing.sources = frozenset(fed if fed < towers else ())
    for rule in rules:
        rule.ready()
        if not rule.prepared:
            name = type(rule).__name__
            raise Refused(
                f"{name} measures each prompt before it is run: write ab.steer(model, rule, "
                "prompt=ab.prompt(tokenizer, ...)), or rule = rule.prepare(model, prompt)."
            )
        missing = [name for name in rule.needs if name not in editing.spans]
        if missing:
            raise AttnbiasError(
                f"{type(rule).__name__} needs the span {missing[0]!r}; spans has "
                f"{', '.join(editing.spans.names())}: pass spans=ab.prompt(...).spans or name it."
            )
        if places:
            check_places(rule, places)
    with (
        attach(model, editing) as session,
        wiring(session, editing),
        streaming(session, editing),
        dropping(session, editing),
        stepping(session, editing),
        gate(editing, session),
    ):
        yield
    editing.tell()


def _prompted(
    model: nn.Module,
    rules: Sequence[Rule],
    spans: Mapping[str, Any] | None,
    prompt: Prompt | None,
) -> tuple[tuple[Rule, ...], Mapping[str, Any] | None]:
    """Rules and spans for one prompt."""
    if prompt is None:
        return tuple(rules), spans
    from attnbias.hub.prompt import Prompt

    if not isinstance(prompt, Prompt):
        raise AttnbiasError(
            f"prompt must be what ab.prompt(tokenizer, ...) returns, got {type(prompt).__name__}."
        )
    for rule in rules:
        rule.ready()
    made = (rule.prepare(model, prompt) if rule.uses("prepare") else rule for rule in rules)
    return _checked(tuple(made)), {**prompt.spans, **(spans or {})}  # type: ignore[return-value]


def _checked(rules: Sequence[Any]) -> Sequence[Rule]:
    for rule in rules:
        if not isinstance(rule, Rule):
            raise AttnbiasError(
                "steer takes rules such as ab.rules.KeyShift(...), got "
                f"{rule.__name__ + ' itself' if isinstance(rule, type) else type(rule).__name__}."
            )
    return rules


def attends(rule: Rule) -> bool:
    """Whether the rule looks at attention calls at all."""
    return any(map(rule.uses, ("vectors", "bias", "reallocate", "outputs", "look")))


def check_places(rule: Rule, places: Sequence[Site]) -> None:
    """Refuse a rule that names towers or layers that the model does not have."""
    towers = list(dict.fromkeys(site.tower for site in places))
    name = type(rule).__name__
    if rule.towers is None and len(towers) > 1:
        raise Refused(
            f"{name} names no tower and the model has {', '.join(towers)}, whose token positions "
            f"differ: write towers=({towers[0]!r},) or the like."
        )
    for tower in rule.towers or ():
        if tower not in towers:
            raise AttnbiasError(
                f"{name} names the tower {tower!r}, but the model has {', '.join(towers)}."
            )
    layers = {site.layer for site in places if rule.towers is None or site.tower in rule.towers}
    unknown = rule.named_layers() - layers
    if unknown:
        raise AttnbiasError(
            f"{name} names layer {max(unknown)}, but the model has layers 0 to {max(layers)}."
        )
