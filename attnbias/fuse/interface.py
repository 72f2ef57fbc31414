"""Our second name in the registries of transformers, for modules that call the interface.

The functions hold no state: what a call needs is on its module (`door.Mark`) and in its arguments,
so a fused model can be copied, pickled, run from any thread and under gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from attnbias.errors import Refused
from attnbias.fuse import modes
from attnbias.fuse.door import MARK, Mark
from attnbias.fuse.position import PositionBias
from attnbias.hub.checks import FUSED
from attnbias.hub.parsing import Rule
from attnbias.hub.registry import CONFIG_KEY, LOCK, Registered
from attnbias.hub.request import MaskRequest
from attnbias.hub.stock import stock_attention

NAME = FUSED
SUPPORTED = ("sdpa", "eager")
# id of a config -> itself, what it named, and whether masks of one query are requests, too.
_originals: dict[int, tuple[Any, str, bool]] = {}


@modes.outside_graphs
def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """What transformers calls for attention under our name."""
    mark = mark_of(module)
    if mark.family is not None:
        out = mark.family.attend(module, query, key, value, attention_mask, mark.original, **kwargs)
        if out is not None:
            return out, None
    mask = stock_mask(attention_mask, mark.original, query)
    if isinstance(kwargs.get("position_bias"), PositionBias):
        kwargs["position_bias"] = kwargs["position_bias"].stock()
    stock = stock_attention(module, mark.original)
    return stock(module, query, key, value, mask, **kwargs)


def stock_mask(mask: Any, original: str, query: Tensor) -> Any:
    """The mask that the model's own code would have been given."""
    if isinstance(mask, PositionBias):
        return mask.stock()
    if not isinstance(mask, MaskRequest):
        return mask
    mask = mask.stock(original)
    return mask.to(query.device) if isinstance(mask, Tensor) else mask


def mark_of(module: nn.Module) -> Mark:
    """What a module carries; that of its config for a module that shares one with a fused model."""
    found = vars(module).get(MARK)
    if isinstance(found, Mark):
        return found
    known = _originals.get(id(getattr(module, "config", None)))
    if known is None:
        raise Refused(
            f"{type(module).__name__} names {NAME!r} but is part of no fused model; call "
            "model.set_attn_implementation('sdpa') on the model it belongs to."
        )
    return Mark(None, known[1])


@modes.outside_graphs
def mask_function(*args: Any, **kwargs: Any) -> Any:
    """What transformers calls for a mask under our name: the request is kept, not carried out.

    A decoded token's mask is one row, and where no family takes its attention, it is made at once.
    """
    given = kwargs.get("attention_mask")
    if isinstance(given, MaskRequest):
        return given
    known = _originals.get(id(kwargs.get("config")))
    if args:
        names = ("batch_size", "q_length", "kv_length")
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    alone = known is not None and not known[2] and modes.route() != "fused"
    if known is not None and alone and kwargs.get("q_length") == 1:
        return _stock_mask(known[1])(**kwargs)
    return MaskRequest(_stock_mask, kwargs, None if known is None else known[1])


def _stock_mask(original: str) -> Rule:
    from transformers import masking_utils

    found: Rule = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[original]
    return found


_registered = Registered(NAME, attention_function, mask_function)


def switching(config: Any, tokens: bool) -> Callable[[], Callable[[], None]]:
    """The change of a `Door` that lets `config` name us; `tokens`: see `Family.tokens`."""

    def change() -> Callable[[], None]:
        with LOCK:
            before = vars(config)[CONFIG_KEY]
            _registered.add()
            _originals[id(config)] = (config, before or "eager", tokens)
            vars(config)[CONFIG_KEY] = NAME

        def back() -> None:
            with LOCK:
                vars(config)[CONFIG_KEY] = before
                del _originals[id(config)]
                _registered.drop()

        return back

    return change
