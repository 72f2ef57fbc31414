"""Branches: second forwards of the same model beside the main one, with their own cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError, Refused
from attnbias.steer.edit import Memory
from attnbias.steer.record import MEDIA, Record, arguments, names_of
from attnbias.steer.spans import Spans
from attnbias.steer.trimming import compact as compacted
from attnbias.steer.trimming import last, pick, shortened

if TYPE_CHECKING:
    from attnbias.hub import Site
    from attnbias.steer.context import Editing
    from attnbias.steer.looking import Looking
    from attnbias.steer.rule import Rule
    from attnbias.steer.step import Step, Stepper


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A second forward of the model beside the main one.

    It is fed the main sequence's tokens and runs on first use, with a cache of its own; its prompt
    may be shorter. The other rules in force act there too (on its own positions), the rule that
    owns the branch does not: only its `look` is called there.

    Args:
        without: names of spans whose tokens are left out, with the pixels behind them.
        rules: rules in force in the branch alone.
        embeds: name of a method ``(step, embeddings) -> embeddings`` of the rule, which rewrites
            the prompt's input embeddings ``(batch, tokens, size)``.
        shared: start from the main sequence's cache, without the prompt's last token: `rules` then
            act from that token on, and the prompt is not run a second time where the cache can be
            copied.
    """

    without: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    embeds: str | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        if self.shared and (self.without or self.embeds):
            raise AttnbiasError(
                "Branch: shared=True starts from the main sequence's cache, so nothing of the "
                "prompt can be left out or rewritten."
            )


class Lane:
    """One branch of one main sequence.

    Attributes:
        logits: ``(batch, vocabulary)`` at the branch's newest token, in float32 (float64).
        looked: what the rule's `look` returned in the branch's newest forward, by site.
    """

    def __init__(self, stepper: Stepper, record: Record, number: int, name: str) -> None:
        self._stepper, self._record, self._number, self._name = stepper, record, number, name
        self._rule: Rule = stepper.editing.rules[number]
        self._branch: Branch = self._rule.branches[name]
        self._version = -1
        self._logits: Tensor | None = None
        self.reset()

    def reset(self) -> None:
        """Begin anew with the next forward."""
        self.used = 0  # tokens of the main sequence that the branch has been fed
        self._cache: Any = None
        self._real: Tensor | None = None
        self._lost = False  # whether images of the prompt were left out
        self._compacted = False  # whether its rows are laid out in another way than the main ones
        self._twins: dict[int, Editing] = {}
        self._own: Editing | None = None
        self._looking: Looking | None = None
        self._logits = None

        # A text without images never computes its offset anew, so the main one must not be there.
        with_offset = [one for one in self._owners if "rope_deltas" in vars(one)]
        self._attributes = {id(one): {"rope_deltas": None} for one in with_offset}

    @property
    def logits(self) -> Tensor:
        assert self._logits is not None
        return self._logits

    @property
    def looked(self) -> dict[Site, Any]:
        return {} if self._looking is None else self._looking.memory.looked

    # Running --------------------------------------------------------------------------------------

    def follow(self, step: Step | None) -> None:
        """Run the branch up to the main sequence's newest token, once in each forward."""
        record, branch = self._record, self._branch
        if self._version == record.version:
            return
        self._version = record.version
        if branch.embeds and step is None:
            raise Refused(
                f"the branch {self._name!r} of {type(self._rule).__name__} rewrites embeddings by "
                "what the whole forward showed: it can be used in `logits` only."
            )
        if record.steps == 0 and (branch.embeds or branch.shared):
            self.reset()  # a prompt in chunks: what was decided on its first ones is void
        if branch.shared and self.used == 0 and not self._share():
            # The prompt without each row's last token, then that token under the branch's rules.
            order = torch.arange(record.length, device=record.real.device)
            newest = record.real & (order == record.real.long().mul(order).amax(-1, keepdim=True))
            if bool((record.real & ~newest).any()):
                self._feed(record.real & ~newest, None, inner=())
            self._feed(newest, step, inner=branch.rules, again=True)
            return
        keep = record.real & ~self._removed()
        self._feed(keep[:, self.used :], step, inner=branch.rules)

    def _share(self) -> bool:
        """Take the main sequence's cache without its last token, if that can be cut off."""
        record = self._record
        cache = record.cache() if record.cache is not None else None
        every = bool(record.real[:, -1].all())
        copied = shortened(cache, record.length) if every and record.length > 1 else None
        if copied is None:
            return False
        self._cache, self._real = copied, record.real[:, :-1]
        self.used = record.length - 1
        self._attributes = {id(one): dict(_plain(one)) for one in self._owners}
        for editing in self._editors():
            twin = self._twin(editing)
            kept = [memory for rule, memory in _pairs(editing) if rule is not self._rule]
            for memory, old in zip(twin.memories, kept, strict=True):
                memory.frozen.update(old.frozen)
        return True

    def _feed(self, keep: Tensor, step: Step | None, inner: Any, again: bool = False) -> None:
        """Run the main sequence's newest tokens as far as they are kept.

        Args:
            keep: bool ``(batch, new)``. again: of tokens that were fed without these before.
        """
        record, session = self._record, self._stepper.session
        stop = record.length
        start = stop - keep.shape[1]
        chunk = record.since(start, self._embed)
        real = record.real[:, start:]
        tokens = chunk.embeds if chunk.ids is None else chunk.ids
        assert tokens is not None
        kinds, extras = dict(chunk.kinds), {} if again else dict(chunk.extras)
        self._compacted = compact = self._compacted or not bool((keep == real).all())
        if any(MEDIA.search(name) for name in extras):
            self._drop_media(extras, tokens, real & ~keep, keep, record.inside(start))
        order = None
        if compact:
            order, keep = compacted(keep, type(self._rule).__name__, self._name)
            tokens = pick(tokens, order)
            kinds = {name: pick(value, order) for name, value in kinds.items()}
        self._real = keep if self._real is None else torch.cat([self._real, keep], 1)
        given: dict[str, Any] = {**extras, **kinds}
        given["input_ids" if not tokens.is_floating_point() else "inputs_embeds"] = tokens
        if not bool(self._real.all()):
            given["attention_mask"] = self._real.long()
        positions = self._positions(start, order)
        if positions is not None:
            given["position_ids"] = positions
        given |= {"past_key_values": self._cache, "use_cache": True, "return_dict": True}
        if self._accepts("logits_to_keep") and bool(keep[:, -1].all()):
            given["logits_to_keep"] = 1
        self.used = stop
        output = self._run(session, given, step, inner)
        self._cache = getattr(output, "past_key_values", None)
        if self._cache is None:
            raise Refused(
                f"{type(record.module).__name__} returns no cache, so the branch {self._name!r} of "
                f"{type(self._rule).__name__} cannot be continued."
            )
        self._logits = last(output.logits, keep)

    def _run(self, session: Any, given: dict[str, Any], step: Step | None, inner: Any) -> Any:
        from attnbias.steer.looking import Looking

        editors: list[Any] = [self._twin(one) for one in self._editors()]
        spans = self._spans(self._stepper.editing)
        if inner:
            if self._own is None:
                self._own = self._editing(inner, spans)
                self._own.flow = self._stepper.editing.flow
            editors.append(self._own)
        if self._looking is None:
            self._looking = Looking(self._stepper.editing, self._number, spans, self._name)
        editors.append(self._looking)
        flows = {id(one.flow): one.flow for one in editors if one.flow is not None}
        with ExitStack() as stack:
            stack.enter_context(self._own_attributes())
            for flow in flows.values():
                stack.enter_context(flow.aside())
            stack.enter_context(session.aside(editors))
            if self._branch.embeds and step is not None and step.number == 0:
                stack.enter_context(self._rewriting(step))
            return self._record.module(**given)

    @contextmanager
    def _rewriting(self, step: Step) -> Iterator[None]:
        """The decoder's input embeddings, after images are in, by the rule's method."""
        decoder = self._decoder
        method = getattr(self._rule, self._branch.embeds or "")

        def rewrite(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            given = arguments(module, args, kwargs)
            embeds = given.get("inputs_embeds")
            if embeds is None:
                embeds = self._embed(given["input_ids"])
            new = method(step, embeds)
            if not isinstance(new, Tensor) or new.shape != embeds.shape:
                got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
                raise AttnbiasError(
                    f"{type(self._rule).__name__}.{self._branch.embeds} must return the shape "
                    f"{tuple(embeds.shape)}, got {got}."
                )
            return (), {**given, "input_ids": None, "inputs_embeds": new}

        handle = decoder.register_forward_pre_hook(rewrite, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    # The model --------------------------------------------------------------------------------

    @property
    def _owners(self) -> list[nn.Module]:
        """The pretrained models that contain attention, each once."""
        found = self._stepper.session.found
        return list({id(one): one for entry in found for one in entry.owners}.values())

    @property
    def _decoder(self) -> nn.Module:
        found = self._stepper.session.found
        entry = next((e for e in found if e.site.tower in ("text", "decoder")), found[-1])
        return entry.owners[-1]

    def _embed(self, ids: Tensor) -> Tensor:
        found: Tensor = self._decoder.get_input_embeddings()(ids)  # type: ignore[operator]
        return found

    def _accepts(self, name: str) -> bool:
        owner = self._owners[0]
        return name in names_of(owner)

    @contextmanager
    def _own_attributes(self) -> Iterator[None]:
        """What models note on themselves (offsets of multimodal positions) belongs to a branch."""
        kept = [(one, dict(_plain(one))) for one in self._owners]
        for one in self._owners:
            vars(one).update(self._attributes.get(id(one), {}))
        try:
            yield
            self._attributes = {id(one): dict(_plain(one)) for one in self._owners}
        finally:
            for one, values in kept:
                vars(one).update(values)

    # Rules and spans ------------------------------------------------------------------------------

    def _editors(self) -> list[Editing]:
        return [one for one in self._stepper.session.participants if one.role == "edit"]

    def _editing(self, rules: Any, spans: Spans) -> Editing:
        from attnbias.steer.context import Editing

        made = Editing(rules, None)
        made.spans = spans
        return made

    def _twin(self, editing: Editing) -> Editing:
        """The other rules of a context, on the branch's positions and with their own memory."""
        if id(editing) not in self._twins:
            rules = [rule for rule in editing.rules if rule is not self._rule]
            twin = self._editing(rules, self._spans(editing))
            twin.flow = editing.flow
            self._twins[id(editing)] = twin
        return self._twins[id(editing)]

    def _spans(self, editing: Editing) -> Spans:
        names = self._branch.without
        if not names:
            return editing.spans
        return editing.spans.without(names, self._record.batch, self._stepper.editing.spans)

    def _removed(self) -> Tensor:
        positions = self._record.positions
        if not self._branch.without:
            return torch.zeros_like(positions, dtype=torch.bool)
        spans = self._stepper.editing.spans
        return spans.chosen(self._branch.without, positions, self._record.batch)

    # Inputs ---------------------------------------------------------------------------------------

    def _positions(self, start: int, order: Tensor | None) -> Tensor | None:
        """Position ids of the branch's new tokens; None where the model counts by itself."""
        if not self._accepts("position_ids"):
            return None
        moved = self._record.moved(self._record.real & self._removed())
        if moved is not None:
            new = moved[..., start:]
            if order is None:
                return new
            return new.gather(-1, order.expand(*new.shape[:-1], order.shape[1]))
        assert self._real is not None
        whole = order is None or bool(self._real.all())
        if whole or any("rope_deltas" in vars(one) for one in self._owners):
            return None
        assert order is not None
        return (self._real.long().cumsum(-1) - 1).clamp(min=0)[:, -order.shape[1] :]

    def _drop_media(
        self, extras: dict[str, Any], tokens: Tensor, gone: Tensor, keep: Tensor, late: bool
    ) -> None:
        """Leave out pixels whose tokens are left out; some of several images is refused.

        late: the branch begins after the first token of a forward (it shares the cache before).
        """
        config = getattr(self._owners[0], "config", None)
        names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
        marks = [mark for name in names if isinstance(mark := getattr(config, name, None), int)]
        if tokens.is_floating_point() or not marks:
            lost, left = bool(gone.any()) and bool(self._branch.without), False
        else:
            media = torch.isin(tokens, torch.tensor(marks, device=tokens.device))
            lost, left = bool((media & gone).any()), bool((media & keep).any())
        if lost and left:
            raise Refused(
                f"{type(self._rule).__name__} leaves {', '.join(self._branch.without)} out of a "
                "branch, but other images or videos stay in the batch: leave out all or none."
            )
        self._lost = self._lost or lost
        # Some versions of transformers repeat the grids of images at every step.
        if (self._lost or late) and not left:
            for name in [name for name in extras if MEDIA.search(name)]:
                del extras[name]


def _plain(module: nn.Module) -> Mapping[str, Any]:
    """Public attributes of a module that are tensors or nothing."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and (value is None or isinstance(value, Tensor))
    }


def _pairs(editing: Editing) -> list[tuple[Rule, Memory]]:
    return list(zip(editing.rules, editing.memories, strict=True))
