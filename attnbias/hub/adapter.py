"""The one door into a model: registered names, switched configs, hooks, and their exact removal."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from attnbias.bias import Bias
from attnbias.errors import Refused
from attnbias.hub.call import Call
from attnbias.hub.registry import (
    CONFIG_KEY,
    CONFIGS,
    LOCK,
    SITES,
    SUPPORTED,
    assert_registered,
    outside_graphs,
    register,
    switch,
    switch_back,
    unregister,
)
from attnbias.hub.sites import Found, Site, find, unwrap


class Participant(Protocol):
    """Something that takes part in a model's attention: role "see" or "edit"."""

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

    def __init__(self, model: nn.Module) -> None:
        self.root = unwrap(model)
        self.found = find(self.root)
        self.sites = [entry.site for entry in self.found]
        self.participants: list[Any] = []
        self.calls: Counter[Site] = Counter()
        self.forward = -1
        self.thread = threading.get_ident()
        self.decoder_call: Before | None = None
        self._frames: list[tuple[int, bool]] = []
        self._maps_asked = False
        self._undo: list[Callable[[], None]] = []

    # Entry and exit --------------------------------------------------------------------------

    def open(self) -> None:
        """Switch the model over; on any error everything done so far is undone."""
        try:
            _check(self.root, self.found)
            register()
            self._undo.append(unregister)
            for config in _configs(self.root, self.found):
                switch(config)
                self._undo.append(partial(switch_back, config))
            for entry in self.found:
                SITES[id(entry.module)] = (entry.module, entry.site, self)
                self._undo.append(partial(_drop, SITES, id(entry.module)))
            for module in _hooked(self.root, self.found):
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

    def enter(self, module: nn.Module, maps_asked: bool) -> None:
        places = [number for number, (key, _) in enumerate(self._frames) if key == id(module)]
        if places:  # left over from a forward that was interrupted
            del self._frames[places[0] :]
        recomputed = _in_backward()
        if not recomputed:
            self.check_thread()
        outermost = not self._frames
        self._frames.append((id(module), recomputed))
        self._maps_asked |= maps_asked
        if outermost and not recomputed:
            assert_registered()
            self.forward += 1
            self._maps_asked = False
            self.decoder_call = None
            for participant in self.participants:
                participant.begin_forward(self.forward)

    def leave(self, module: nn.Module, finished: bool) -> None:
        if not self._frames or self._frames[-1][0] != id(module):
            return
        _, recomputed = self._frames.pop()
        if self._frames or recomputed or not finished:
            return
        self.decoder_call = None
        if not self.calls:
            raise Refused(_ignores(self.root))
        for participant in self.participants:
            participant.end_forward(self.forward)

    # Calls -----------------------------------------------------------------------------------

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
        if site.kind == "self" and site.tower.startswith("decoder"):
            self.decoder_call = Before(call.past, call.query.shape[2], call.query_positions)
        editors = [one for one in self.participants if one.role == "edit"]
        viewers = [one for one in self.participants if one.role == "see" and not recomputed]
        output: Tensor | None = None
        extra: Bias | None = None
        lse: Tensor | None = None
        if editors:
            output, extra = type(editors[0]).compute(call, editors)
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
                viewer.see(call, extra, output, lse)
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
        entry[1].enter(module, bool(asked))


@outside_graphs
def _after_forward(module: nn.Module, args: Any, output: Any) -> None:
    entry = _HOOKED.get(id(module))
    if entry is not None and entry[0] is module:
        # Models never return None: torch passes None when the forward has raised.
        entry[1].leave(module, finished=output is not None)


# Which parts of a model --------------------------------------------------------------------------


def _ignores(root: nn.Module) -> str:
    return (
        f"{type(root).__name__} does not call the attention interface of transformers (it computes "
        "attention in code of its own), so it can be neither observed nor steered."
    )


def _configs(root: nn.Module, found: list[Found]) -> list[Any]:
    """Every distinct config that decides how a site attends or how its mask is made."""
    holders = [entry.module for entry in found] + [one for entry in found for one in entry.owners]
    configs: dict[int, Any] = {}
    for holder in holders:
        config = getattr(holder, "config", None)
        if config is None or CONFIG_KEY not in vars(config):
            continue
        known = CONFIGS.get(id(config))
        name = known[1] if known else vars(config)[CONFIG_KEY]
        if name in SUPPORTED:
            configs[id(config)] = config
        elif name is not None:
            raise Refused(
                f"{type(root).__name__} uses attention implementation {name!r}; write "
                f"model.set_attn_implementation('sdpa') first (supported: {', '.join(SUPPORTED)})."
            )
    return list(configs.values())


def _check(root: nn.Module, found: list[Found]) -> None:
    if not found:
        raise Refused(_ignores(root))
    for entry in found:
        config = getattr(entry.module, "config", None)
        if config is None or CONFIG_KEY not in vars(config):
            raise Refused(
                f"{entry.site.name} ({type(entry.module).__name__}) has no config that names its "
                "attention implementation."
            )


def _hooked(root: nn.Module, found: list[Found]) -> list[nn.Module]:
    """The modules whose calls are forwards: the root and all pretrained models with sites."""
    modules = {id(root): root}
    modules |= {id(owner): owner for entry in found for owner in entry.owners}
    return list(modules.values())


def _join(model: nn.Module) -> Session:
    with LOCK:
        root = unwrap(model)
        found = find(root)
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
        session = Session(model)
        session.open()
        return session


@contextmanager
def attach(model: nn.Module, participant: Any) -> Iterator[Session]:
    """Let `participant` take part in the attention of `model` until the block ends.

    Contexts of one thread on one model nest and share one session. On the last exit the model, its
    configs and the registries are as they were, whatever was raised inside.

    Raises:
        Refused: the model does not use the attention interface, uses an implementation other than
            sdpa or eager, or is inside a context of another thread.
    """
    session = _join(model)
    session.participants.append(participant)
    try:
        yield session
    finally:
        with LOCK:
            for number in reversed(range(len(session.participants))):
                if session.participants[number] is participant:
                    del session.participants[number]
                    break
            if not session.participants:
                session.close()
