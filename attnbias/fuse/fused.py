"""``ab.fuse(model)``: find, replace, check, measure, say."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import nn

from attnbias.errors import AttnbiasError, Refused
from attnbias.fuse import modes
from attnbias.fuse.door import MARK, Door, Mark
from attnbias.fuse.families import FAMILIES
from attnbias.fuse.family import Place
from attnbias.fuse.find import Found, find
from attnbias.fuse.interface import SUPPORTED, switching
from attnbias.fuse.trial import Gain, differs, measured
from attnbias.hub.checks import ASIDES
from attnbias.hub.device import runs_on
from attnbias.hub.registry import CONFIG_KEY, LOCK, SITES
from attnbias.hub.sites import unwrap

if TYPE_CHECKING:
    from attnbias.fuse.factors import Factors

_fused: weakref.WeakKeyDictionary[nn.Module, Fused] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class LeftAlone:
    """Modules that keep their own code. names: where. kind: their class. reason: why."""

    names: tuple[str, ...]
    kind: str
    reason: str


@dataclass(frozen=True)
class Sites:
    """Modules of one kind and shape that were replaced.

    Attributes:
        names: where. kind: their class. family, form: whose code, and the bias in words.
        lowering: how `attention` computes it where it was measured, else in the check.
        gain: what was measured, if it was.
        difference: largest difference of the output from stock over the largest output.
    """

    names: tuple[str, ...]
    kind: str
    family: str
    form: str
    lowering: str
    difference: float
    gain: Gain | None = None


@dataclass
class Fused:
    """A model whose biased attention is fused, until `undo` or the end of a ``with`` block.

    Attributes:
        model: class name. sites: what was replaced. left: what was not, and why.
        device: where it runs. note: why nothing was replaced; empty otherwise.
    """

    model: str
    device: str
    sites: list[Sites] = field(default_factory=list)
    left: list[LeftAlone] = field(default_factory=list)
    note: str = ""
    _root: nn.Module | None = field(default=None, repr=False)
    _door: Door = field(default_factory=Door, repr=False)

    @property
    def replaced(self) -> int:
        """How many modules were replaced."""
        return sum(len(one.names) for one in self.sites)

    def undo(self) -> None:
        """Leave the model as it was. Once is enough; again does nothing."""
        self._door.close()
        if self._root is not None:
            _fused.pop(self._root, None)

    def __enter__(self) -> Fused:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        from attnbias.fuse.words import told

        return told(self)


def fuse(
    model: nn.Module,
    *,
    length: int = 1024,
    batch: int = 1,
    check: bool = True,
    measure: bool = True,
    quiet: bool = False,
    factors: Factors | None = None,
) -> Fused:
    """Let the attention of `model` that carries a bias run through structured kernels.

    The modules that are known (`attnbias support --all` lists them) are computed by `attention`
    with the bias as a structure: same outputs, same gradients, same generation, without the N x N
    tensor. Each kind of module is first compared with its own code on random input. Calls that are
    too small to gain, other devices than the CPU (unless `modes.taking` asks for the fused route:
    what benchmarks do), and calls that ask for attention maps take the model's own code. Weights,
    configs and state dicts are untouched. In a context of `observe` or `steer` the model computes
    by its own code, too, and is fused again after.

    Args:
        model: a transformers model or any module that holds known ones. It may train, generate, be
            saved and be copied as before.
        length, batch: the size of the check's measurement; modules of fixed length ignore it.
        check: compare each kind of module with its own code first (two small calls).
        measure: time one module of each kind beside its own code at `length`.
        quiet: do not print what was done; `str` of the result says it, too.
        factors: pair biases of low rank from `attnbias.fuse.learn`, used in place of the exact ones
            where no gradients are recorded: an approximation.

    Returns:
        What was done, with `undo`; as a context manager it undoes at the end of the block.

    Raises:
        Refused: nothing in the model is known; the sentence says what was found. Nothing is
            changed then.
    """
    root = unwrap(model)
    found = find(root)
    _refuse_double(root)
    _refuse_context(root)
    if not found.places:
        raise Refused(_nothing(root, found))
    device = runs_on(root)
    name = type(root).__name__
    left = [LeftAlone(names, kind, reason) for (kind, reason), names in found.left.items()]
    here = device.type == "cpu"  # where the examples of the check are made
    if not here and modes.route() != "fused":
        note = f"no kernels were measured on {device.type}: nothing was replaced, all is as before."
        fused = Fused(name, str(device), left=left, note=note)
    else:
        sizes = (batch, length)
        fused = Fused(name, str(device), left=left, _root=root)
        check, measure = check and here, measure and here
        _open(fused, root, found, check=check, measure=measure, sizes=sizes, factors=factors)
    if not quiet:
        print(fused)
    return fused


def undo(model: nn.Module) -> None:
    """Undo `fuse` for a model whose `Fused` was not kept."""
    root = unwrap(model)
    fused = _fused.get(root)
    if fused is None:
        raise AttnbiasError(f"{type(root).__name__} is not fused.")
    fused.undo()


def _step_aside(root: nn.Module) -> Callable[[], None] | None:
    """Put the own code of fused models back that share modules or configs with `root`."""
    with LOCK:
        here = _identities(root)
        stepped = [
            fused
            for other, fused in list(_fused.items())
            if fused._door.is_open and not here.isdisjoint(_identities(other))
        ]
        for fused in stepped:
            fused._door.close()

    def back() -> None:
        for fused in reversed(stepped):
            if fused._root is not None and _fused.get(fused._root) is fused:  # not undone since
                fused._door.open()

    return back if stepped else None


def _identities(root: nn.Module) -> set[int]:
    found = {id(module) for module in root.modules()}
    configs = [getattr(module, "config", None) for module in root.modules()]
    return found | {id(one) for one in configs if one is not None}


ASIDES.append(_step_aside)


def _refuse_context(root: nn.Module) -> None:
    for module in root.modules():
        entry = SITES.get(id(module))
        if entry is not None and entry[0] is module:
            raise Refused(
                f"{type(root).__name__} is being observed or steered; fuse it before that context "
                "begins, or after it has ended."
            )


def _refuse_double(root: nn.Module) -> None:
    for name, module in root.named_modules():
        if MARK in vars(module):
            where = f" ({name})" if name else ""
            raise Refused(
                f"{type(root).__name__}{where} is fused already; undo that first: "
                "ab.fuse.undo(model)."
            )


def _nothing(root: nn.Module, found: Found) -> str:
    name = type(root).__name__
    if found.left:
        (kind, reason), names = next(iter(found.left.items()))
        more = f" and {len(found.left) - 1} other kinds" if len(found.left) > 1 else ""
        return f"{name}: {kind} ({names[0]}{more}) is not fused: {reason}"
    return (
        f"{name} holds no attention with a bias that is known (attnbias support --all lists what "
        "is): there is nothing to replace."
    )


def _open(
    fused: Fused,
    root: nn.Module,
    found: Found,
    *,
    check: bool,
    measure: bool,
    sizes: tuple[int, int],
    factors: Factors | None,
) -> None:
    places = dict(found.places)
    groups = _groups(places)
    for group in groups:
        place, family = group[0], places[group[0]]
        names = tuple(one.name for one in group)
        kind = type(place.module).__name__
        trial = plan([(place, family)], root)
        difference, seen = 0.0, ("", "")
        if check:
            try:
                reason, difference, seen = differs(place, family, trial)
            except (Refused, AttnbiasError) as refusal:
                reason = str(refusal)
            if reason:
                fused.left.append(LeftAlone(names, kind, reason))
                for one in group:
                    del places[one]
                continue
        gain = measured(place, family, trial, *sizes) if measure else None
        form = family.form
        lowering = seen[1] if gain is None else gain.lowering or "its own code"
        fused.sites.append(Sites(names, kind, family.name, form, lowering, difference, gain))
    if not places:
        raise Refused(
            f"{fused.model}: nothing is fused. {fused.left[-1].names[0]}: {fused.left[-1].reason}"
        )
    fused._door = plan(list(places.items()), root)
    if factors is not None:
        factors.plan(fused, list(places), fused._door)
    fused._door.open()
    _fused[root] = fused


def _groups(places: dict[Place, Any]) -> list[list[Place]]:
    """Places of one class, family and shapes of weights, in the order of the model."""
    groups: dict[Any, list[Place]] = {}
    for place, family in places.items():
        shapes = tuple((name, tuple(one.shape)) for name, one in place.module.named_parameters())
        flags = tuple(
            (name, value)
            for name, value in vars(place.module).items()
            if isinstance(value, (bool, str)) and name not in ("training", "_is_hf_initialized")
        )
        key = (family.name, type(place.module), family.kind(place), shapes, flags)
        groups.setdefault(key, []).append(place)
    return list(groups.values())


def plan(places: list[tuple[Place, Any]], root: nn.Module) -> Door:
    """The changes that fuse some modules: configs, marks, hooks, and the families' own."""
    door = Door()
    configs: dict[int, tuple[Any, str]] = {}
    for place, _ in places:
        config = place.config
        if config is not None and CONFIG_KEY in vars(config):
            configs[id(config)] = (config, vars(config)[CONFIG_KEY] or "eager")
    for config, original in configs.values():
        if original not in SUPPORTED:
            raise Refused(
                f"{type(root).__name__} uses attention implementation {original!r}; write "
                f"model.set_attn_implementation('sdpa') first (supported: {', '.join(SUPPORTED)})."
            )
        tokens = any(family.tokens for place, family in places if place.config is config)
        door.change(switching(config, tokens))
    families = {id(place.module): family for place, family in places}
    for module in root.modules():
        known = configs.get(id(getattr(module, "config", None)))
        if id(module) in families:
            place_config = next(one for one, _ in places if one.module is module).config
            original = configs.get(id(place_config), (None, ""))[1]
            door.set(module, MARK, Mark(families[id(module)], original))
        elif known is not None:
            door.set(module, MARK, Mark(None, known[1]))
    for owner in {id(place.owner): place.owner for place, _ in places}.values():
        door.change(_hooking(owner))
    for place, family in places:
        family.prepare(place, door)
    return door


def _hooking(owner: nn.Module) -> Callable[[], Callable[[], None]]:
    def change() -> Callable[[], None]:
        before = owner.register_forward_pre_hook(modes.before_forward, with_kwargs=True)
        after = owner.register_forward_hook(modes.after_forward, always_call=True)

        def back() -> None:
            before.remove()
            after.remove()

        return back

    return change


__all__ = ["FAMILIES", "Fused", "LeftAlone", "Sites", "fuse", "undo"]
