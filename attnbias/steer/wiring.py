"""What flows between self- and cross-attention in blocks with gated self-attention (GLIGEN)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from attnbias.errors import AttnbiasError, Refused

if TYPE_CHECKING:
    from attnbias.hub import Session, Site
    from attnbias.steer.context import Editing


_OTHERS = ("hidden", "tokens", "logits", "decode")


class Wired(NamedTuple):
    """What a block goes on with, after its gated self-attention.

    Attributes:
        stream: the residual stream ``(batch, patches, size)``.
        read: what cross-attention reads (through its norm).
    """

    stream: Tensor
    read: Tensor


@dataclass(frozen=True)
class BlockCall:
    """A block with gated self-attention, as a rule sees it.

    Attributes:
        site: its cross-attention. timestep: the step of the denoising ``(batch | 1,)``, None where
            the model was given none.
    """

    site: Site
    timestep: Tensor | None


@contextmanager
def wiring(session: Session, editing: Editing) -> Iterator[None]:
    """Hooks on the blocks, for rules that rewire them.

    Raises:
        Refused: a model without such blocks, or with norms that do more than normalise.
    """
    if session.kind == "diffusion":
        for rule in editing.rules:
            other = any(map(rule.uses, _OTHERS)) or rule.reads_hidden or bool(rule.branches)
            if other:
                raise Refused(
                    f"{type(rule).__name__} edits more than attention, which a diffusion model is "
                    "not made for: it works on language and vision models."
                )
    wanted = [n for n, rule in enumerate(editing.rules) if rule.uses("wire")]
    if not wanted:
        yield
        return
    name = type(editing.rules[wanted[0]]).__name__
    modules = dict(session.root.named_modules())
    handles: list[Any] = []
    try:
        for site in session.sites:
            block: Any = modules[site.name.rpartition(".")[0]]
            if site.tower != "cross" or getattr(block, "fuser", None) is None:
                continue
            if getattr(block, "norm_type", None) != "layer_norm":
                raise Refused(f"{site.name}: its block has no plain norm before cross-attention.")
            between = _Between(editing, wanted, session, site)
            # An inner context acts on what an outer one has wired: its hooks come later.
            handles.append(block.fuser.register_forward_hook(between.after))
            handles.append(block.norm2.register_forward_pre_hook(between.before))
        if not handles:
            raise Refused(
                f"{name} rewires gated self-attention, and {type(session.root).__name__} has none: "
                'load a GLIGEN model (attention_type="gated").'
            )
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Between:
    """From the end of gated self-attention to the norm of cross-attention in one block."""

    def __init__(self, editing: Editing, wanted: list[int], session: Session, site: Site) -> None:
        self.editing, self.wanted, self.session, self.site = editing, wanted, session, site
        self.read: Tensor | None = None

    def after(self, module: Any, args: Any, output: Tensor) -> Tensor | None:
        before, stream = args[0], output
        self.read = None
        call = BlockCall(self.site, self.session.timestep)
        for number in self.wanted:
            rule = self.editing.rules[number]
            if not rule.acts_in(self.site.tower, self.site.layer, "prefill"):
                continue
            found = rule.wire(call, before, stream)
            self.editing.effects[number].add("idle" if found is None else "changed")
            if found is None:
                continue
            if any(one.shape != output.shape for one in found):
                raise AttnbiasError(
                    f"{type(rule).__name__}.wire must return the shape {tuple(output.shape)}."
                )
            stream, self.read = found
        return None if stream is output else stream

    def before(self, module: Any, args: Any) -> Any:
        read, self.read = self.read, None
        return None if read is None else (read, *args[1:])
