"""The adapter to diffusers: self- and cross-attention of UNets, through their processors.

A processor owns the whole body of an attention module. Ours lets the one that was there do it, and
takes over its single call of scaled dot product attention; so norms, projections and residuals are
the library's own, bit for bit, and only plain processors can be carried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from attnbias.bias import Bias, KeyBias
from attnbias.errors import AttnbiasError, Refused
from attnbias.hub.adapter import Session
from attnbias.hub.call import Call
from attnbias.hub.registry import SITES
from attnbias.hub.sites import Found, Site

if TYPE_CHECKING:
    from attnbias.hub.prompt import Span

ORIGINAL = "diffusers"
_PLAIN = "AttnProcessor2_0"
_HIDDEN = -1e4  # what diffusers adds to the scores of masked tokens
_FLOW = ("down_blocks", "mid_block", "up_blocks")  # their order in a forward


def find_diffusion(model: nn.Module) -> list[Found]:
    """Every attention module of a diffusers model: towers "self", "cross" and "gated".

    Layers count in the order in which a UNet runs its blocks: down, middle, up.
    """
    from diffusers.models.attention_processor import Attention

    def place(name: str) -> int:
        top = name.split(".")[0]
        return _FLOW.index(top) if top in _FLOW else len(_FLOW)

    named = [(name, one) for name, one in model.named_modules() if isinstance(one, Attention)]
    counts: dict[str, int] = {}
    found = []
    for name, module in sorted(named, key=lambda entry: place(entry[0])):
        cross = bool(module.is_cross_attention)
        tower = "gated" if name.endswith("fuser.attn") else "cross" if cross else "self"
        layer = counts.get(tower, 0)
        counts[tower] = layer + 1
        found.append(
            Found(Site(tower, layer, name, "cross" if cross else "self"), module, (model,))
        )
    return found


class DiffusionCall(Call):
    """One attention call of a diffusers model.

    Queries are patches (or other latent tokens); the keys of cross-attention are the prompt's
    tokens, whose positions are their places in the prompt.

    Attributes:
        timestep: what the model was given as the step of the denoising: 999 is noise, 0 the image.
    """

    @property
    def timestep(self) -> Tensor | None:
        found: Tensor | None = self.session.timestep
        return found

    @property
    def past(self) -> int:
        return 0

    @property
    def bias(self) -> Bias | None:
        mask = self._mask
        if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[2] == 1:
            return KeyBias(mask[:, :, 0])
        return super().bias

    @property
    def query_positions(self) -> Tensor:
        return torch.arange(self.query.shape[2], device=self.query.device)[None]

    @property
    def key_positions(self) -> Tensor:
        found = torch.arange(self.key.shape[2], device=self.query.device)[None]
        mask = self._mask
        if isinstance(mask, Tensor) and mask.is_floating_point():
            found = found.masked_fill((mask <= _HIDDEN).all(2).all(1), -1)
        return found


def _stock(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any
) -> tuple[Tensor, None]:
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=0.0, is_causal=False, scale=given["scaling"]
    )
    return out.transpose(1, 2), None


class _Taken(TorchFunctionMode):
    """Answers the call of scaled dot product attention inside a processor."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.calls = module, 0

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        if function is not scaled_dot_product_attention:
            return function(*args, **given)
        self.calls += 1
        mask = given.get("attn_mask")
        if len(args) != 3 or given.get("dropout_p") or given.get("is_causal") or self.calls > 1:
            raise Refused(
                f"{type(self.module).__name__}: its processor calls attention in a way that is not "
                "known, so it can be neither observed nor steered."
            )
        entry = SITES.get(id(self.module))
        if entry is None or entry[0] is not self.module:
            return function(*args, **given)
        _, site, session = entry
        arguments = {"scaling": given.get("scale"), "is_causal": False}

        def call_of(forward: int, recomputed: bool) -> Call:
            return DiffusionCall(
                session,
                site,
                self.module,
                args,
                mask,
                arguments,
                ORIGINAL,
                _stock,
                forward,
                recomputed,
            )

        out, _ = session.attend(site, call_of)
        return out.transpose(1, 2)


class Carried:
    """The processor that stands in for `inner` while a context lasts."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        with _Taken(attn) as taken:
            out: Tensor = self.inner(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs
            )
        if taken.calls != 1:
            raise Refused(
                f"{type(self.inner).__name__} did not call the fused attention of PyTorch: write "
                "unet.set_attn_processor(AttnProcessor2_0())."
            )
        return out


def _forget(key: int) -> None:
    SITES.pop(key, None)


class DiffusionSession(Session):
    """A diffusers model between entry and exit of its outermost context."""

    kind = "diffusion"
    places = staticmethod(find_diffusion)

    def open(self) -> None:
        name = type(self.root).__name__
        try:
            if not self.found:
                raise Refused(
                    f"{name} has no attention modules of the kind that is known (diffusers' "
                    "Attention), so it can be neither observed nor steered."
                )
            for entry in self.found:
                self._carry(entry)
            self._hook(self.root)
        except BaseException:
            self.close()
            raise

    def _carry(self, entry: Found) -> None:
        from diffusers.models.attention_processor import AttnProcessor2_0

        module, inner = entry.module, getattr(entry.module, "processor", None)
        if type(inner) is not AttnProcessor2_0:
            raise Refused(
                f"{entry.site.name} has the processor {type(inner).__name__}, which may do more "
                f"than attention; only {_PLAIN} is carried: write "
                "unet.set_attn_processor(AttnProcessor2_0()) if nothing of it is needed."
            )
        vars(module)["processor"] = Carried(inner)
        self._undo.append(partial(vars(module).__setitem__, "processor", inner))
        SITES[id(module)] = (module, entry.site, self)
        self._undo.append(partial(_forget, id(module)))

    def ready(self, args: Any, kwargs: Any) -> None:
        """Nothing is registered anywhere; the step is remembered."""
        given = args[1] if len(args) > 1 else kwargs.get("timestep")
        self.timestep = None if given is None else torch.as_tensor(given).reshape(-1)


def guided(spans: Mapping[str, Span]) -> dict[str, list[Span]]:
    """Spans of a prompt for classifier-free guidance, where each forward has two rows.

    The first row runs without the prompt, so nothing lies in its spans.
    """
    return {name: [(0, 0), span] for name, span in spans.items()}


def phrases(tokenizer: Any, prompt: str, names: Sequence[str]) -> dict[str, Span]:
    """Where words or phrases of a prompt stand among its tokens.

    Args:
        tokenizer: a fast tokenizer, such as ``CLIPTokenizerFast``. prompt: the text.
        names: words or phrases as they stand in it; each becomes a span of that name.

    Raises:
        AttnbiasError: a slow tokenizer, a phrase that stands there never or more than once.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise AttnbiasError(
            "tokenizer must be a fast tokenizer (it tells which characters a token covers), got "
            f"{type(tokenizer).__name__}."
        )
    offsets = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    found: dict[str, Span] = {}
    for name in names:
        if not name or prompt.count(name) != 1:
            raise AttnbiasError(
                f"the phrase {name!r} stands {prompt.count(name) if name else 0} times in the "
                "prompt, expected once: take in the words around it."
            )
        start, stop = prompt.index(name), prompt.index(name) + len(name)
        tokens = [n for n, (a, b) in enumerate(offsets) if a < b and a < stop and b > start]
        found[name] = (tokens[0], tokens[-1] + 1)
    return found
