"""Our one name in the registries of transformers: there on entry, gone on the last exit.

The functions are module-level and hold no state: compiled graphs and other libraries' wrappers may
keep them after a context has ended, so they find the session by the identity of the module.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from attnbias.errors import Refused
from attnbias.hub.call import Call
from attnbias.hub.parsing import Rule
from attnbias.hub.request import MaskRequest
from attnbias.hub.sites import Site
from attnbias.hub.stock import stock_attention

NAME = "attnbias"  # a plain word: "flash" or "/" in a name change what transformers does with it
SUPPORTED = ("sdpa", "eager")
CONFIG_KEY = "_attn_implementation_internal"
LOCK = threading.RLock()

F = TypeVar("F", bound=Callable[..., Any])


def outside_graphs(function: F) -> F:
    """Keep `function` out of compiled graphs.

    Participants run any Python on live tensors, and which of them are there must be read anew at
    each call, not frozen into a graph: one graph break per attention layer, in a context only.
    """
    said = "attnbias observes and edits outside graphs"
    return cast(F, torch.compiler.disable(function, reason=said))  # type: ignore[no-untyped-call]


class Host(Protocol):
    """What a session must be able to do for a call that reached us."""

    def attend(self, site: Site, call_of: Callable[[int, bool], Call]) -> tuple[Tensor, Any]: ...


SITES: dict[int, tuple[nn.Module, Site, Any]] = {}
CONFIGS: dict[int, list[Any]] = {}  # id -> [config, name of the original implementation, users]


@outside_graphs
def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """What transformers calls for attention under our name."""
    original = _original(module)
    stock = stock_attention(module, original)
    entry = SITES.get(id(module))
    if entry is None or entry[0] is not module:
        # A model that shares its config with the one in the context: not ours, stock.
        mask = attention_mask
        if isinstance(mask, MaskRequest):
            mask = mask.stock(original)
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

    return cast(Host, session).attend(site, call_of)


@outside_graphs
def mask_function(*args: Any, **kwargs: Any) -> MaskRequest:
    """What transformers calls for a mask under our name: the request is kept, not carried out."""
    given = kwargs.get("attention_mask")
    if isinstance(given, MaskRequest):
        return given  # static caches ask twice: once ahead of the forward, once inside it
    entry = CONFIGS.get(id(kwargs.get("config")))
    if args:
        names = ("batch_size", "q_length", "kv_length")
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    # generate may hand over a copy of the config: then the layer that asks says what is stock.
    return MaskRequest(_stock_mask, kwargs, None if entry is None else str(entry[1]))


def _stock_mask(original: str) -> Rule:
    """The mask function of an implementation. Looked up anew: another library may wrap it."""
    from transformers import masking_utils

    found: Rule = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[original]
    return found


def _original(module: nn.Module) -> str:
    entry = CONFIGS.get(id(getattr(module, "config", None)))
    if entry is None:
        raise Refused(
            f"{type(module).__name__} names {NAME!r} but is in no context: it was copied inside "
            "one; copy before entering, or call copy.set_attn_implementation('sdpa')."
        )
    return str(entry[1])


# Names -------------------------------------------------------------------------------------------

_ABSENT = object()
Function = Callable[..., Any]


def tables(attention: Function, mask: Function) -> list[tuple[dict[str, Any], Function]]:
    """The maps that hold a name, each with its function: class-wide ones, and local ones, which
    win over them.
    """
    from transformers import masking_utils, modeling_utils

    functions = modeling_utils.ALL_ATTENTION_FUNCTIONS
    masks = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    return [
        (type(functions)._global_mapping, attention),
        (functions._local_mapping, attention),
        (type(masks)._global_mapping, mask),
        (masks._local_mapping, mask),
    ]


class Registered:
    """One name in the registries of transformers, there as long as somebody uses it."""

    def __init__(self, name: str, attention: Function, mask: Function) -> None:
        self.name, self._functions = name, (attention, mask)
        self._users = 0
        self._saved: list[tuple[dict[str, Any], Any]] = []

    def add(self) -> bool:
        """One more user; True for the first. What was under the name is remembered."""
        if self._users == 0:
            mine = tables(*self._functions)
            self._saved.extend((table, table.get(self.name, _ABSENT)) for table, _ in mine)
        self._users += 1
        self.renew()
        return self._users == 1

    def renew(self) -> None:
        """Put our functions in place again: another library may have wrapped every entry since."""
        for table, function in tables(*self._functions):
            if table.get(self.name) is not function:
                table[self.name] = function

    def drop(self) -> bool:
        """One user less; True for the last, which leaves the registries as they were."""
        self._users -= 1
        if self._users:
            return False
        while self._saved:
            table, before = self._saved.pop()
            if before is _ABSENT:
                table.pop(self.name, None)
            else:
                table[self.name] = before
        return True


_registered = Registered(NAME, attention_function, mask_function)


_HOOK_GUARDS = "skip_nnmodule_hook_guards"
_guards: dict[str, Any] = {}


def _guard_hooks() -> None:
    """While we are there, compiled code looks whether a module has hooks.

    By default it does not: code made for a layer without an edit would run for one with an edit.
    """
    name = "torch._dynamo.config"
    config = sys.modules.get(name)  # nothing is compiled where it has not been imported
    if config is not None and hasattr(config, _HOOK_GUARDS):
        _guards[name] = getattr(config, _HOOK_GUARDS)
        setattr(config, _HOOK_GUARDS, False)


def register() -> None:
    """Put our functions under our name, remembering what was there."""
    with LOCK:
        if _registered.add():
            _guard_hooks()


def assert_registered() -> None:
    """Put our functions in place again: see `Registered.renew`."""
    _registered.renew()


def unregister() -> None:
    """Take our name away again when nobody uses it any more."""
    with LOCK:
        if _registered.drop():
            for config, value in _guards.items():
                setattr(sys.modules[config], _HOOK_GUARDS, value)
            _guards.clear()


def switch(config: Any) -> None:
    """Let `config` name us; counted, as models may share a config."""
    entry = CONFIGS.setdefault(id(config), [config, vars(config)[CONFIG_KEY], 0])
    entry[2] += 1
    vars(config)[CONFIG_KEY] = NAME


def switch_back(config: Any) -> None:
    """Undo one `switch`."""
    entry = CONFIGS[id(config)]
    entry[2] -= 1
    if entry[2] == 0:
        vars(config)[CONFIG_KEY] = entry[1]
        del CONFIGS[id(config)]
