"""The one door into a model: registered names, switched configs, hooks, and their exact removal."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from attnbias.bias import Bias
from attnbias.errors import Refused
from attnbias.hub.call import Call
from attnbias.hub.checks import ASIDES, check, configs, hooked, ignores, one_graph
from attnbias.hub.registry import (
    LOCK,
    SITES,
    assert_registered,
    outside_graphs,
    register,
    switch,
    switch_back,
    unregister,
)
from attnbias.hub.sites import Site, find, is_diffusion, unwrap
from attnbias.hub.verify import difference, probed

# Towers whose output cross-attention reads: their own positions are not those of its queries.
_SOURCES = ("encoder", "vision", "audio")


class Participant(Protocol):
    """Something that takes part in a model's attention: role "see" or "edit".

    An observer has ``see(call, extra, output, lse)``: `extra` is the additive log-edit in force and
    `output` what the model goes on with. An editor's class has ``compute(call, editors)``, static,
    returning the edited output (None: plain), the extra bias, the call as viewers must see it and
    why they cannot (empty: they can). Optional: `required`, sites that
    must have been called by the time the context ends without an error; and, around each forward of
    the outermost module, ``before_forward(module, args, kwargs)`` and ``after_forward(module,
    output)``, whose return value is what the caller gets.
    """

    role: str

    def begin_forward(self, forward: int) -> None: ...

    def end_forward(self, forward: int) -> None: ...


@dataclass(frozen=True)
class Before:
    """What cross-attention needs to know of the decoder's own layer before it."""

    past: int
    queries: int
    query_positions: Tensor


class Session:
    """One model between entry and exit of its outermost context.

    Attributes:
        sites: where the model attends. calls: how often each site has been called.
        forward: number of the running (or last) forward, -1 before the first.
    """

    kind = "transformers"
    places = staticmethod(find)

    def __init__(self, model: nn.Module) -> None:
        self.root = unwrap(model)
        self.found = self.places(self.root)
        self.sites = [entry.site for entry in self.found]
        self.participants: list[Any] = []
        self.calls: Counter[Site] = Counter()
        self.forward = -1
        self.thread = threading.get_ident()
        self.decoder_call: Before | None = None
        self.flow: Any = None  # hidden states, where a participant follows them
        self.timestep: Tensor | None = None  # of a diffusion model's forward that runs
        self.drops: Any = None  # which tokens layers run on, where a participant drops some
        self._crosses = any(site.kind == "cross" for site in self.sites)
        self._frames: list[tuple[int, bool]] = []
        self._maps_asked = False
        self._verified: dict[Site, str] = {}
        self.kept: dict[Any, Any] = {}  # what calls have found out about this model
        self._undo: list[Callable[[], None]] = []

    # Entry and exit --------------------------------------------------------------------------

    def open(self) -> None:
        """Switch the model over; on any error everything done so far is undone."""
        try:
            for aside in ASIDES:
                back = aside(self.root)
                if back is not None:
                    self._undo.append(back)
            check(self.root, self.found)
            register()
            self._undo.append(unregister)
            for config in configs(self.root, self.found):
                switch(config)
                self._undo.append(partial(switch_back, config))
            for entry in self.found:
                SITES[id(entry.module)] = (entry.module, entry.site, self)
                self._undo.append(partial(_drop, SITES, id(entry.module)))
            for module in hooked(self.root, self.found):
                self._hook(module)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Undo everything, in reverse order."""
        while self._undo:
            self._undo.pop()()
        self._frames.clear()
        self.decoder_call = None

    def _hook(self, module: nn.Module) -> None:
        _HOOKED[id(module)] = (module, self)
        self._undo.append(partial(_drop, _HOOKED, id(module)))
        before = module.register_forward_pre_hook(_before_forward, with_kwargs=True)
        self._undo.append(before.remove)
        after = module.register_forward_hook(_after_forward, always_call=True)
        self._undo.append(after.remove)

    # Forwards --------------------------------------------------------------------------------

    def check_thread(self) -> None:
        if threading.get_ident() != self.thread:
            raise Refused(
                f"{type(self.root).__name__} is inside an attnbias context of another thread; "
                "use one model object per thread."
            )

    def enter(
        self, module: nn.Module, maps_asked: bool, args: Any = (), kwargs: Any = None
    ) -> None:
        recomputed = _in_backward()
        if not recomputed:
            self.check_thread()
        places = [number for number, (key, _) in enumerate(self._frames) if key == id(module)]
        if places:  # left over from a forward that was interrupted
            del self._frames[places[0] :]
        outermost = not self._frames
        self._frames.append((id(module), recomputed))
        self._maps_asked = maps_asked or (self._maps_asked and not outermost)
        if outermost and not recomputed:
            self.ready(args, kwargs or {})
            self.forward += 1
            self.decoder_call = None
            for participant in self.participants:
                participant.begin_forward(self.forward)
            for participant in self.participants:
                if hasattr(participant, "before_forward"):
                    participant.before_forward(module, args, kwargs or {})

    def ready(self, args: Any, kwargs: Any) -> None:
        """What a forward needs before it begins."""
        assert_registered()

    def leave(self, module: nn.Module, output: Any) -> Any:
        """What the caller of `module` gets; None for `output` itself."""
        if threading.get_ident() != self.thread and not _in_backward():
            return None  # the other thread that has just been refused
        if not self._frames or self._frames[-1][0] != id(module):
            return None
        _, recomputed = self._frames.pop()
        if self._frames or recomputed or output is None:
            return None
        self.decoder_call = None
        if not self.calls:
            raise Refused(ignores(self.root))
        for participant in self.participants:
            participant.end_forward(self.forward)
        for participant in list(self.participants):
            if hasattr(participant, "after_forward"):
                output = participant.after_forward(module, output)
        return output

    @contextmanager
    def aside(self, participants: Iterable[Any]) -> Iterator[None]:
        """Forwards of other participants, also in the middle of one; this session's state stays."""
        kept = (self.participants, self._frames, self._maps_asked, self.decoder_call, self.forward)
        calls = Counter(self.calls)
        self.participants, self._frames = list(participants), []
        self._maps_asked, self.decoder_call = False, None
        try:
            with self.drops.aside() if self.drops is not None else nullcontext():
                yield
        finally:
            (
                self.participants,
                self._frames,
                self._maps_asked,
                self.decoder_call,
                self.forward,
            ) = kept
            self.calls.clear()
            self.calls.update(calls)

    def require(self, wanted: Iterable[Site]) -> None:
        """Raise `Refused`, naming them, if forwards ran and some of `wanted` were not called."""
        missing = [site for site in wanted if not self.calls[site]]
        if missing and self.forward >= 0:
            raise Refused(
                f"{type(self.root).__name__} never called {', '.join(map(str, missing))} through "
                "the attention interface: nothing was seen or edited there."
            )

    # Calls -----------------------------------------------------------------------------------

    def verified(self, call: Call) -> str:
        """Why this site is not what its calls say, empty where it is; looked at once per site."""
        if call.site not in self._verified:
            self._verified[call.site] = ""  # the check itself reads the call
            self._verified[call.site] = difference(call, probed(call.query.shape[2]))
        return self._verified[call.site]

    def attend(self, site: Site, call_of: Callable[[int, bool], Call]) -> tuple[Tensor, Any]:
        recomputed = _in_backward() or any(again for _, again in self._frames)
        if not recomputed:
            self.check_thread()
            if not self._frames:
                raise Refused(
                    f"{site} was called outside a forward of the model; call model(...) itself, "
                    "not model.forward(...) or a layer alone."
                )
            self.calls[site] += 1
        call = call_of(self.forward, recomputed)
        if site.kind == "self" and self._crosses and not site.tower.startswith(_SOURCES):
            self.decoder_call = Before(call.past, call.query.shape[2], call.query_positions)
        editors = [one for one in self.participants if one.role == "edit"]
        viewers = [one for one in self.participants if one.role == "see" and not recomputed]
        output: Tensor | None = None
        extra: Bias | None = None
        lse: Tensor | None = None
        seen = call
        if editors:
            output, extra, seen, unseen = type(editors[0]).compute(call, editors)
            if unseen and viewers:
                raise Refused(unseen)
        weights = None
        if output is not None and self._maps_asked and call.original == "eager":
            raise Refused(
                f"{site} is edited, and output_attentions would return the unedited map; leave it "
                "out, and use ab.observe to see the edited attention."
            )
        if output is None:
            if viewers:
                output, lse = call.plain_with_lse()
            weights = call.outcome()[1] if not viewers or lse is None else None
            output = call.plain() if output is None else output
        for viewer in viewers:
            with torch.no_grad():
                viewer.see(seen, extra, output, lse)
        return output, weights


# Hooks. They find the session at run time for the same reason as the registered functions do.

_HOOKED: dict[int, tuple[nn.Module, Session]] = {}


def _drop(table: dict[int, Any], key: int) -> None:
    table.pop(key, None)


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


@outside_graphs
def _before_forward(module: nn.Module, args: Any, kwargs: Any) -> None:
    entry = _HOOKED.get(id(module))
    if entry is not None and entry[0] is module:
        asked = kwargs.get("output_attentions")
        if asked is None:
            asked = getattr(getattr(module, "config", None), "output_attentions", False)
        entry[1].enter(module, bool(asked), args, kwargs)


@outside_graphs
def _after_forward(module: nn.Module, args: Any, output: Any) -> Any:
    entry = _HOOKED.get(id(module))
    if entry is not None and entry[0] is module:
        # Models never return None: torch passes None when the forward has raised.
        return entry[1].leave(module, output)
    return None


def _join(model: nn.Module) -> Session:
    with LOCK:
        root = unwrap(model)
        kind = Session
        if is_diffusion(root):
            from attnbias.hub.diffusion import DiffusionSession

            kind = DiffusionSession
        found = kind.places(root)
        others = {
            id(SITES[id(entry.module)][2]): SITES[id(entry.module)][2]
            for entry in found
            if id(entry.module) in SITES
        }
        for session in others.values():
            session.check_thread()
            if {id(entry.module) for entry in session.found} != {
                id(entry.module) for entry in found
            }:
                raise Refused(
                    f"part of {type(root).__name__} is already inside an attnbias context; nest "
                    "contexts on the same model object."
                )
            joined: Session = session
            return joined
        session = kind(model)
        session.open()
        return session


@contextmanager
def attach(model: nn.Module, participant: Any) -> Iterator[Session]:
    """Let `participant` take part in the attention of `model` until the block ends.

    Contexts of one thread on one model nest and share one session. On the last exit the model, its
    configs and the registries are as they were, whatever was raised inside.

    Raises:
        Refused: the model does not use the attention interface, uses an implementation other than
            sdpa or eager, is inside a context of another thread, or is compiled as one graph.
    """
    session = _join(model)
    session.participants.append(participant)
    try:
        yield session
        session.require(getattr(participant, "required", ()))
    except Exception as error:
        if one_graph(error):
            raise Refused(
                f"{type(session.root).__name__} is compiled with fullgraph=True, and what observes "
                "and edits attention runs outside graphs: compile it without fullgraph."
            ) from error
        raise
    finally:
        with LOCK:
            for number in reversed(range(len(session.participants))):
                if session.participants[number] is participant:
                    del session.participants[number]
                    break
            if not session.participants:
                session.close()
