"""Which layers of a model can be observed and steered, found by running it once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError, Refused
from attnbias.hub.adapter import attach
from attnbias.hub.call import Call
from attnbias.hub.device import runs_on
from attnbias.hub.sites import Site, sites, unwrap
from attnbias.hub.verify import difference


@dataclass(frozen=True)
class Layer:
    """What one site can do: `calls` in one forward, and `reason`, empty where all is well."""

    site: Site
    calls: int
    reason: str

    @property
    def supported(self) -> bool:
        """Whether the layer can be observed and steered (the two need the same)."""
        return not self.reason


@dataclass(frozen=True)
class Support:
    """What attnbias can do with a model; `str()` says it in words.

    Attributes:
        model: class name. layers: one entry per site. reason: why nothing works, empty otherwise.
    """

    model: str
    layers: list[Layer] = field(default_factory=list)
    reason: str = ""

    @property
    def supported(self) -> bool:
        """Whether at least one layer can be observed and steered."""
        return any(layer.supported for layer in self.layers)

    def __str__(self) -> str:
        if self.reason:
            return f"{self.model}: no. {self.reason}"
        good = sum(layer.supported for layer in self.layers)
        lines = [
            f"{self.model}: {good} of {len(self.layers)} attention layers can be observed and "
            "steered"
        ]
        width = max(len(str(layer.site)) for layer in self.layers)
        for layer in self.layers:
            calls = "1 call" if layer.calls == 1 else f"{layer.calls} calls"
            said = "observe, steer" if layer.supported else f"no: {layer.reason}"
            lines.append(f"  {layer.site!s:<{width}}  {calls:<8}  {said}")
        return "\n".join(lines)


class _Probe:
    """Looks at every call and keeps the first reason why it is not what we say it is."""

    role = "see"

    def __init__(self) -> None:
        self.reasons: dict[Site, str] = {}

    def begin_forward(self, forward: int) -> None:
        """Nothing to prepare."""

    def end_forward(self, forward: int) -> None:
        """Nothing to close."""

    def see(self, call: Call, extra: Any, output: Tensor, lse: Tensor | None) -> None:
        if self.reasons.get(call.site):
            return
        try:
            self.reasons[call.site] = difference(call, range(call.query.shape[2]))
        except Refused as refusal:
            self.reasons[call.site] = str(refusal)


def support(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> Support:
    """Run `model` once and report which of its attention layers can be observed and steered.

    Each call that reaches us is counted and compared with the attention that its description
    (`Call.scale`, `Call.bias`, `Call.sink`) gives; a layer that computes more is named.

    Args:
        model: a transformers model, wrapped or not. It is run in eval mode without gradients and
            left as it was; the random state is not touched.
        inputs: keyword arguments of one forward. By default a few tokens, an image or blank audio.

    Returns:
        A report; a model that cannot be used is a report that says so, not an error.

    Raises:
        AttnbiasError: the default inputs do not fit this model; give `inputs`.
    """
    root = unwrap(model)
    name = type(root).__name__
    probe = _Probe()
    given = dict(inputs) if inputs is not None else _small_inputs(root)
    try:
        with _quiet(root), attach(model, probe) as session:
            try:
                model(**given)
            except AttnbiasError:
                raise
            except Exception as error:
                if inputs is not None:
                    raise
                _with_image(model, root, given, error)
            calls = dict(session.calls)
    except Refused as refusal:
        return Support(name, reason=str(refusal))
    layers = []
    for site in sites(root):
        count = calls.get(site, 0)
        reason = probe.reasons.get(site, "") if count else "not called by this forward"
        layers.append(Layer(site, count, reason))
    return Support(name, layers)


@contextmanager
def _quiet(root: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, own random numbers; every module's mode restored."""
    modes = [(module, module.training) for module in root.modules()]
    try:
        root.eval()
        with torch.no_grad(), torch.random.fork_rng():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _with_image(model: nn.Module, root: nn.Module, given: dict[str, Any], error: Exception) -> None:
    """Models of text and image want both: one more try before giving up."""
    try:
        model(**given, **_small_inputs(root, "pixel_values"))
    except AttnbiasError:
        raise
    except Exception:
        raise AttnbiasError(
            f"{type(root).__name__} did not run on the default inputs ({', '.join(given)}): "
            f"{error}; give inputs=, the keyword arguments of one forward."
        ) from error


def _small_inputs(root: nn.Module, main: str | None = None) -> dict[str, Tensor]:
    """One small forward for the kinds of models that are known."""
    owner: Any = root
    while not hasattr(owner, "config"):
        owner = next(iter(owner.children()), None)
        if owner is None:
            return {}
    config = owner.config
    device = runs_on(root)
    main = main or str(getattr(owner, "main_input_name", "input_ids"))
    if main == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        channels = int(getattr(vision, "num_channels", 3))
        dtype = next(one.dtype for one in root.parameters() if one.is_floating_point())
        pixels = torch.linspace(-1, 1, channels * int(height) * int(width))
        return {main: pixels.reshape(1, channels, int(height), int(width)).to(device, dtype)}
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = int(getattr(text, "vocab_size", 2))
    tokens = (torch.arange(6, device=device) % max(vocabulary - 1, 1))[None]
    if main == "input_features":
        length = 2 * int(getattr(config, "max_source_positions", 8))
        shape = (1, int(getattr(config, "num_mel_bins", 80)), length)
        return {main: torch.zeros(shape, device=device), "decoder_input_ids": tokens}
    inputs = {"input_ids": tokens}
    if bool(getattr(config, "is_encoder_decoder", False)):
        inputs["decoder_input_ids"] = tokens[:, :3]
    return inputs
