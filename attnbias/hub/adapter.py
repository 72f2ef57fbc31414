"""The one door into a model: registered names, switched configs, hooks, and their exact removal."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from attnbias.bias import Bias
from attnbias.errors import Refused
from attnbias.hub.call import Call
from attnbias.hub.request import MaskRequest
from attnbias.hub.sites import Found, Site, calling_function, eager_function, find, unwrap

NAME = "attnbias"  # a plain word: "flash" or "/" in a name change what transformers does with it
SUPPORTED = ("sdpa", "eager")
CONFIG_KEY = "_attn_implementation_internal"
_UPCAST = "reorder_and_upcast_attn"
_LOCK = threading.RLock()


class Participant(Protocol):
    """Something that takes part in a model's attention: an observer ("see") or an editor ("edit")."""

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
        self._undo: list[Callable[[], None]] = []

    # Entry and exit --------------------------------------------------------------------------

    def open(self) -> None:
        """Switch the model over; on any error everything done so far is undone."""
        try:
            _check(self.root, self.found)
            self._register()
            for config in _configs(self.root, self.found):
                _switch(config)
                self._undo.append(lambda config=config: _switch_back(config))  # type: ignore[misc]
            for entry in self.found:
                _SITES[id(entry.module)] = (entry.module, entry.site, self)
                self._undo.append(lambda key=id(entry.module): _drop(_SITES, key))  # type: ignore[misc]
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

    def _register(self) -> None:
        _register()
        self._undo.append(_unregister)

    def _hook(self, module: nn.Module) -> None:
        _HOOKED[id(module)] = (module, self)
        self._undo.append(lambda: _drop(_HOOKED, id(module)))
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

    def enter(self, module: nn.Module) -> None:
        places = [number for number, (key, _) in enumerate(self._frames) if key == id(module)]
        if places:  # left over from a forward that was interrupted
            del self._frames[places[0] :]
        recomputed = _in_backward()
        if not recomputed:
            self.check_thread()
        outermost = not self._frames
        self._frames.append((id(module), recomputed))
        if outermost and not recomputed:
            _assert_registered()
            self.forward += 1
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
                    f"{site} was called outside a forward of the model; call model(...) itself, not "
                    "model.forward(...) or a layer alone."
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
        if output is None:
            if viewers:
                output, lse = call.plain_with_lse()
            weights = call.outcome()[1] if not viewers or lse is None else None
            output = call.plain() if output is None else output
        for viewer in viewers:
            with torch.no_grad():
                viewer.see(call, extra, output, lse)
        return output, weights


# Module-level functions: compiled graphs and other libraries' wrappers may keep them after a context ends,
# so they hold no state and find the session by the identity of the module at run time.

_SITES: dict[int, tuple[nn.Module, Site, Session]] = {}
_HOOKED: dict[int, tuple[nn.Module, Session]] = {}
_CONFIGS: dict[int, list[Any]] = {}  # id -> [config, original, users]


def _drop(table: dict[int, Any], key: int) -> None:
    table.pop(key, None)


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


# Why these are kept out of compiled graphs: participants run arbitrary Python on live tensors, and
# which participants are there must be read anew at each call, not frozen into a graph.


@torch.compiler.disable
def _before_forward(module: nn.Module, args: Any, kwargs: Any) -> None:
    entry = _HOOKED.get(id(module))
    if entry is not None and entry[0] is module:
        entry[1].enter(module)


@torch.compiler.disable
def _after_forward(module: nn.Module, args: Any, output: Any) -> None:
    entry = _HOOKED.get(id(module))
    if entry is not None and entry[0] is module:
        # Transformers models never return None: torch passes None when the forward has raised.
        entry[1].leave(module, finished=output is not None)


@torch.compiler.disable
def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """What transformers calls under our name."""
    original = _original(module)
    stock = _stock_attention(module, original)
    entry = _SITES.get(id(module))
    if entry is None or entry[0] is not module:
        # A model that shares its config with the one in the context: not ours, stock.
        mask = attention_mask.stock() if isinstance(attention_mask, MaskRequest) else attention_mask
        return stock(module, query, key, value, mask, **kwargs)
    _, site, session = entry

    def call_of(forward: int, recomputed: bool) -> Call:
        return Call(
            session,
            site,
            module,
            (query, key, value),
            attention_mask,
            kwargs,
            original,
            stock,
            forward,
            recomputed,
        )

    return session.attend(site, call_of)


@torch.compiler.disable
def mask_function(*args: Any, **kwargs: Any) -> MaskRequest:
    """What transformers calls for a mask under our name: the request is kept, not carried out."""
    given = kwargs.get("attention_mask")
    if isinstance(given, MaskRequest):
        return given  # static caches ask twice: once ahead of the forward, once inside it
    from transformers import masking_utils

    entry = _CONFIGS.get(id(kwargs.get("config")))
    original = "sdpa" if entry is None else entry[1]
    if args:  # older callers may pass the first lengths by position
        names = (
            "batch_size",
            "cache_position" if "kv_length" not in kwargs else "q_length",
            "kv_length",
        )
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    return MaskRequest(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[original], kwargs)


def _original(module: nn.Module) -> str:
    entry = _CONFIGS.get(id(getattr(module, "config", None)))
    if entry is None:
        raise Refused(
            f"{type(module).__name__} carries the name {NAME!r} but is in no context: it was copied "
            "inside one. Copy a model before entering, or call copy.set_attn_implementation('sdpa')."
        )
    return str(entry[1])


def _stock_attention(module: nn.Module, original: str) -> Callable[..., tuple[Tensor, Any]]:
    """The function the module would have called: looked up now, as another library may wrap it."""
    if original == "eager" and getattr(module, _UPCAST, False):

        def upcast(
            module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
        ) -> tuple[Tensor, Any]:
            result: tuple[Tensor, Any] = module._upcast_and_reordered_attn(query, key, value, mask)
            return result

        return upcast
    function = calling_function(type(module))
    eager = eager_function(type(module))
    assert function is not None
    registry = function.__globals__["ALL_ATTENTION_FUNCTIONS"]
    if original == "eager":
        found = registry.get("eager", eager)
    else:
        found = registry[original]
    if found is None:
        raise Refused(f"{type(module).__name__} has no eager attention function that can be found.")
    result: Callable[..., tuple[Tensor, Any]] = found
    return result


# Registration under our name ---------------------------------------------------------------------

_ABSENT = object()
_users = 0
_saved: list[tuple[dict[str, Any], Any]] = []


def _registries() -> list[tuple[dict[str, Any], Callable[..., Any]]]:
    """The maps that must hold our name: class-wide ones, and local ones, which win over them."""
    from transformers import masking_utils, modeling_utils

    attention = modeling_utils.ALL_ATTENTION_FUNCTIONS
    masks = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    return [
        (type(attention)._global_mapping, attention_function),
        (attention._local_mapping, attention_function),
        (type(masks)._global_mapping, mask_function),
        (masks._local_mapping, mask_function),
    ]


def _register() -> None:
    global _users
    with _LOCK:
        if _users == 0:
            for table, _ in _registries():
                _saved.append((table, table.get(NAME, _ABSENT)))
        _users += 1
        _assert_registered()


def _assert_registered() -> None:
    """Put our functions in place again: another library may have wrapped or replaced every entry."""
    for table, function in _registries():
        if table.get(NAME) is not function:
            table[NAME] = function


def _unregister() -> None:
    global _users
    with _LOCK:
        _users -= 1
        if _users:
            return
        while _saved:
            table, before = _saved.pop()
            if before is _ABSENT:
                table.pop(NAME, None)
            else:
                table[NAME] = before


def _switch(config: Any) -> None:
    entry = _CONFIGS.setdefault(id(config), [config, vars(config)[CONFIG_KEY], 0])
    entry[2] += 1
    vars(config)[CONFIG_KEY] = NAME


def _switch_back(config: Any) -> None:
    entry = _CONFIGS[id(config)]
    entry[2] -= 1
    if entry[2] == 0:
        vars(config)[CONFIG_KEY] = entry[1]
        del _CONFIGS[id(config)]


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
        known = _CONFIGS.get(id(config))
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
    with _LOCK:
        root = unwrap(model)
        found = find(root)
        others = {
            id(_SITES[id(entry.module)][2]): _SITES[id(entry.module)][2]
            for entry in found
            if id(entry.module) in _SITES
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
            return session
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
        with _LOCK:
            for number in reversed(range(len(session.participants))):
                if session.participants[number] is participant:
                    del session.participants[number]
                    break
            if not session.participants:
                session.close()
