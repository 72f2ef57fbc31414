"""Which parts of a model an entry touches, and what is refused before it touches any."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, cast

from torch import nn

from attnbias.errors import Refused
from attnbias.hub.registry import CONFIG_KEY, CONFIGS, SUPPORTED
from attnbias.hub.sites import Found, compares_names

# Who has changed a model and steps aside while it is in a context: each takes the root and gives
# back what brings it in again (None: it has nothing there). `attnbias.fuse` is one.
ASIDES: list[Callable[[nn.Module], Callable[[], None] | None]] = []
FUSED = "attnbias_fused"  # the implementation that configs of fused models name


def ignores(root: nn.Module) -> str:
    """The sentence for a model whose attention never reaches us."""
    return (
        f"{type(root).__name__} does not call the attention interface of transformers (it computes "
        "attention in code of its own), so it can be neither observed nor steered."
    )


def configs(root: nn.Module, found: list[Found]) -> list[Any]:
    """Every distinct config that decides how a site attends or how its mask is made."""
    holders = [entry.module for entry in found] + [one for entry in found for one in entry.owners]
    chosen: dict[int, Any] = {}
    for holder in holders:
        config = getattr(holder, "config", None)
        if config is None or CONFIG_KEY not in vars(config):
            continue
        known = CONFIGS.get(id(config))
        name = known[1] if known else vars(config)[CONFIG_KEY]
        if name in SUPPORTED:
            chosen[id(config)] = config
        elif name == FUSED:
            raise Refused(
                f"{type(root).__name__} is a copy of a fused model, whose own attention cannot be "
                "put back to be observed or steered; copy the model first, then fuse."
            )
        elif name is not None:
            raise Refused(
                f"{type(root).__name__} uses attention implementation {name!r}; write "
                f"model.set_attn_implementation('sdpa') first (supported: {', '.join(SUPPORTED)})."
            )
    return list(chosen.values())


def check(root: nn.Module, found: list[Found]) -> None:
    """Refuse, before anything is touched, a model that would not do what it says."""
    if not found:
        raise Refused(ignores(root))
    switched = {id(config) for config in configs(root, found)}
    kinds = {type(one) for one in root.modules() if id(getattr(one, "config", None)) in switched}
    for kind in kinds:
        if compares_names(cast(Hashable, kind)):
            raise Refused(
                f"{kind.__name__} computes differently by the name of its attention "
                "implementation, so no other name can stand in for it; it can be neither observed "
                "nor steered."
            )
    for entry in found:
        config = getattr(entry.module, "config", None)
        if config is None or CONFIG_KEY not in vars(config):
            raise Refused(
                f"{entry.site.name} ({type(entry.module).__name__}) has no config that names its "
                "attention implementation."
            )


def hooked(root: nn.Module, found: list[Found]) -> list[nn.Module]:
    """The modules whose calls are forwards: the root and all pretrained models with sites."""
    modules = {id(root): root}
    modules |= {id(owner): owner for entry in found for owner in entry.owners}
    return list(modules.values())


def one_graph(error: Exception) -> bool:
    """Whether a compiler gave up because a graph may not be left where we leave it."""
    if type(error).__module__ != "torch._dynamo.exc":
        return False
    return "attnbias observes and edits outside graphs" in str(error)  # `registry.outside_graphs`
