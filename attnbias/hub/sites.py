"""Where a model attends: its attention modules, numbered by ourselves and named by tower."""

from __future__ import annotations

import dis
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Literal

from torch import nn

from attnbias.errors import AttnbiasError

REGISTRY = "ALL_ATTENTION_FUNCTIONS"
UPCAST = "reorder_and_upcast_attn"
_CROSS = re.compile(r"cross|encoder_attn|encdec|enc_dec", re.IGNORECASE)
_VISION = re.compile(r"vision|visual|image_encoder|image_tower", re.IGNORECASE)
_AUDIO = re.compile(r"audio|speech", re.IGNORECASE)


@dataclass(frozen=True)
class Site:
    """One attention module of a model.

    Attributes:
        tower: "text" (decoder-only models and BERT-type encoders), "vision", "audio", "encoder" and
            "decoder" (of encoder-decoders), "cross" (their cross-attention). A second tower of the
            same kind is "text 2", and so on.
        layer: counts from 0 inside the tower, in the order of `named_modules`.
        name: dotted path of the module inside the (unwrapped) model.
        kind: "self" or "cross".
    """

    tower: str
    layer: int
    name: str
    kind: Literal["self", "cross"] = "self"

    def __str__(self) -> str:
        return f"{self.tower} layer {self.layer}"


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside compile wrappers (`_orig_mod`) and data-parallel wrappers."""
    if not isinstance(model, nn.Module):
        raise AttnbiasError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    while True:
        inner = model._modules.get("_orig_mod")
        if inner is None and type(model).__name__ in (
            "DistributedDataParallel",
            "FullyShardedDataParallel",
        ):
            inner = model._modules.get("module")
        if inner is None:
            return model
        model = inner


def is_diffusion(root: nn.Module) -> bool:
    """Whether a model is one of diffusers; found without importing it."""
    return any(kind.__module__.startswith("diffusers.") for kind in type(root).__mro__)


def pretrained_class() -> type[nn.Module]:
    try:
        from transformers import PreTrainedModel
    except ImportError as error:
        raise AttnbiasError(
            "the hub needs transformers: write pip install 'attnbias[hf]'."
        ) from error
    found: type[nn.Module] = PreTrainedModel
    return found


def calling_function(kind: type) -> FunctionType | None:
    """`_calling_function`, remembered for as long as the class keeps its forward."""
    return _calling_function(kind, getattr(kind, "forward", None))


@functools.lru_cache(maxsize=4096)
def _calling_function(kind: type, forward: object) -> FunctionType | None:
    """The method of an attention class that looks up the attention registry, None if it has none.

    The compiled names are read, not the source text: that works without source files, through
    decorators, and for classes that inherit the method.
    """
    for owner in kind.__mro__:
        if owner is nn.Module:
            break
        for value in vars(owner).values():
            function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
            if not callable(function):
                continue
            function = inspect.unwrap(function)
            if isinstance(function, FunctionType) and REGISTRY in function.__code__.co_names:
                return function
    return None


@functools.cache
def compares_names(kind: type) -> bool:
    """Whether a model class branches on the name of its config's attention implementation.

    Two comparisons are harmless: "not eager" on the way to the registry, which older versions of
    transformers write in every model, and GPT-2's upcast option (`stock.stock_attention`).
    """
    for owner in kind.__mro__:
        path = owner.__module__
        if path.startswith("torch.") or "generation" in path or owner.__name__ == "PreTrainedModel":
            continue  # generation loops only decide which outputs to ask for
        for name, value in vars(owner).items():
            function = inspect.unwrap(value) if callable(value) else value
            if name != "__init__" and isinstance(function, FunctionType) and _compares(function):
                return True
    return False


def _compares(function: FunctionType) -> bool:
    if "_attn_implementation" not in function.__code__.co_names:
        return False
    steps = list(dis.get_instructions(function))
    for before, here, after in zip(steps, steps[1:], steps[2:], strict=False):
        named = before.argval == "config" and here.argval == "_attn_implementation"
        if not named or after.opname != "LOAD_CONST":
            continue
        names = after.argval if isinstance(after.argval, (tuple, frozenset)) else (after.argval,)
        lookup = names == ("eager",) and REGISTRY in function.__code__.co_names
        if not lookup and {"sdpa", "eager"} & set(names):
            return True
    return False


def eager_function(kind: type) -> Callable[..., Any] | None:
    """The eager attention of the model's own file, as the attention class would call it."""
    function = calling_function(kind)
    if function is None:
        return None
    for name in function.__code__.co_names:
        if "eager" in name and callable(function.__globals__.get(name)):
            found: Callable[..., Any] = function.__globals__[name]
            return found
    return None


@dataclass(frozen=True)
class Found:
    """A site with its module and the pretrained models (outermost first) that contain it."""

    site: Site
    module: nn.Module
    owners: tuple[nn.Module, ...]


def find(model: nn.Module) -> list[Found]:
    """All attention modules of `model`, in order, with towers and own layer numbers."""
    root = unwrap(model)
    pretrained = pretrained_class()
    outermost = [name for name, _ in _outermost(root, pretrained)]
    prefix = f"{outermost[0]}." if len(outermost) == 1 and outermost[0] else ""
    modules = dict(root.named_modules())
    counts: dict[tuple[str, str], int] = {}
    tops: dict[str, list[str]] = {}
    found: list[Found] = []
    for name, module in modules.items():
        if isinstance(module, pretrained) or calling_function(type(module)) is None:
            continue
        owners = tuple(
            modules[part] for part in _ancestors(name) if isinstance(modules[part], pretrained)
        )
        path = name.removeprefix(prefix)
        kind: Literal["self", "cross"] = "cross" if _is_cross(module, path) else "self"
        tower = _tower(path, kind, owners)
        top = next((top for top in outermost if not top or name.startswith(f"{top}.")), "")
        known = tops.setdefault(tower, [])
        if top not in known:
            known.append(top)
        if known.index(top) > 0:
            tower = f"{tower} {known.index(top) + 1}"
        layer = counts.get((tower, kind), 0)
        counts[(tower, kind)] = layer + 1
        found.append(Found(Site(tower, layer, path, kind), module, owners))
    return found


def sites(model: nn.Module) -> list[Site]:
    """Where `model` attends.

    Args:
        model: a transformers or diffusers model; one of transformers also inside PEFT,
            `torch.compile` or a plain `nn.Module`.

    Returns:
        One `Site` per attention module, in the order of `named_modules`; empty for a model that
        does not use the attention interface of transformers.
    """
    if is_diffusion(unwrap(model)):
        from attnbias.hub.diffusion import find_diffusion

        return [entry.site for entry in find_diffusion(unwrap(model))]
    return [entry.site for entry in find(model)]


def _outermost(root: nn.Module, pretrained: type[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if isinstance(module, pretrained):
            yield name, module
            return
        for child, inner in module.named_children():
            yield from walk(f"{name}.{child}" if name else child, inner)

    yield from walk("", root)


def _ancestors(name: str) -> Iterator[str]:
    parts = name.split(".")
    for length in range(len(parts)):
        yield ".".join(parts[:length])


def _is_cross(module: nn.Module, path: str) -> bool:
    declared = getattr(module, "is_cross_attention", None)
    if isinstance(declared, bool):
        return declared
    return bool(
        _CROSS.search(type(module).__name__) or _CROSS.search(".".join(path.split(".")[-3:]))
    )


def _tower(path: str, kind: str, owners: tuple[nn.Module, ...]) -> str:
    parts = path.split(".")
    if _VISION.search(path):
        return "vision"
    if owners and bool(getattr(owners[0].config, "is_encoder_decoder", False)):
        if kind == "cross":
            return "cross"
        for part in parts:
            if part in ("encoder", "decoder"):
                return part
    inputs = [str(getattr(owner, "main_input_name", "")) for owner in owners[-1:]]
    if "pixel_values" in inputs:
        return "vision"
    if "input_features" in inputs or "input_values" in inputs or _AUDIO.search(path):
        return "audio"
    return "cross" if kind == "cross" else "text"
