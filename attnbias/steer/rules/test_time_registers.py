"""Test-time registers: the activation of register neurons is moved to an added token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError, Refused
from attnbias.steer.hidden import HiddenCall, TokenCall
from attnbias.steer.hooks import Tokens
from attnbias.steer.rule import Heads, Rule, is_number
from attnbias.steer.rules.key_shift import _finite

RESTS = ("zero", "mean", "outliers", "same")


@dataclass(frozen=True)
class RegisterFit:
    """How register neurons were found, for the record.

    Attributes:
        images: how many were run. marked: in how many a patch exceeded the threshold.
        threshold: the norm above which a patch is an outlier. median: the patches' median norm.
        detect_layer: where norms were measured. highest_layer: the last layer that was searched.
        scores: mean absolute activation on outliers of each neuron that was kept.
    """

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012 - read by pydantic

    images: int
    marked: int
    threshold: float
    median: float
    detect_layer: int
    highest_layer: int
    scores: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class TestTimeRegisters(Rule):
    r"""Give a vision transformer registers that it was not trained with.

    A few MLP units (register neurons) write the high-norm outliers that some patches become. One
    token is added to the sequence, and at each register neuron n of layer l its activation is
    moved there:

    .. math:: a_n^{\text{register}} = s\,m_l, \qquad a_n^{\text{patch}} = 0, \qquad
              m_l = \text{the entry of } \{a_{n'}^t\}_{t,\, n' \in R_l}
              \text{ of the largest magnitude, with its sign}

    The first tokens (CLS) keep their activations. The added tokens start at zero, go through all
    layers and are gone from everything that leaves the layers, pooling included.

    Args:
        neurons: pairs (layer, unit) of the MLP's hidden units; None until `fit` has found them.
        num_registers: tokens to add; 0 adds none (a control: the neurons are silenced).
        scale: s, 1 as published; 0 silences the neurons everywhere but on CLS.
        peak: ``"layer"``: one value for all register neurons of a layer, as published;
            ``"neuron"``: each neuron's own value of largest magnitude.
        rest: what patches keep: ``"zero"`` as published, ``"mean"`` (over patches), ``"outliers"``
            (the mean in place of values above mean + 1 standard deviation), ``"same"``.
        prefix: how many tokens stand before the patches and are left alone (CLS; 0 in SigLIP).
        towers: the vision tower, where the model has others. heads, layers: no part of this rule.
        fitted: the record of the fit, filled in by `fit`.

    Cost: one more token per register; per layer with register neurons one pass over its hidden
    units. Rows of a batch are edited each by itself.

    Raises:
        Refused: no neurons yet; towers with masks, causal attention or rotary positions, where no
            token can be added; mixtures of experts.
        AttnbiasError: neurons that the model does not have.

    Source: Vision Transformers Don't Need Trained Registers, 2025 (arXiv 2506.08010); authors'
    code read. Its revisions differ: some write one signed maximum per layer (the default here),
    some each neuron's own maximum (``peak="neuron"`` takes the largest magnitude where the code
    takes the largest value; the two agree where a register neuron's outliers are positive). The
    code edits batch element 0 alone; here every image has its own maximum.
    """

    heads: Heads = "all"
    neurons: tuple[tuple[int, int], ...] | None = None
    num_registers: int = 1
    scale: float = 1.0
    peak: Literal["layer", "neuron"] = "layer"
    rest: Literal["zero", "mean", "outliers", "same"] = "zero"
    prefix: int = 1
    fitted: RegisterFit | None = None

    hidden_at: ClassVar[tuple[str, ...]] = ("neurons",)
    __test__: ClassVar[bool] = False  # pytest takes the name for a test's

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads != "all" or self.layers != "all":
            raise AttnbiasError(
                "TestTimeRegisters edits neurons: heads and layers stay 'all' (its neurons name "
                "their layers)."
            )
        if self.neurons is not None:
            pairs = tuple(tuple(pair) for pair in self.neurons)
            if not pairs or not all(len(p) == 2 and all(map(is_number, p)) for p in pairs):
                raise AttnbiasError(
                    f"neurons must be pairs (layer, unit) of numbers from 0, got {self.neurons!r}."
                )
            object.__setattr__(self, "neurons", pairs)
        for name in ("num_registers", "prefix"):
            if not is_number(getattr(self, name)):
                raise AttnbiasError(
                    f"{name} must be a whole number from 0, got {getattr(self, name)!r}."
                )
        if not _finite(self.scale):
            raise AttnbiasError(f"scale must be a finite number, got {self.scale!r}.")
        if self.peak not in ("layer", "neuron"):
            raise AttnbiasError(f"peak must be 'layer' or 'neuron', got {self.peak!r}.")
        if self.rest not in RESTS:
            raise AttnbiasError(f"rest must be one of {', '.join(RESTS)}, got {self.rest!r}.")

    def ready(self) -> None:
        if self.neurons is None:
            raise Refused(
                "TestTimeRegisters has no neurons yet: write TestTimeRegisters(neurons=[(layer, "
                "unit), ...]), or run rule = TestTimeRegisters().fit(model, images)."
            )

    def named_layers(self) -> set[int]:
        return {layer for layer, _ in self.neurons or ()}

    def tokens(self, site: TokenCall, hidden: Tensor) -> Tokens | None:
        if site.layer or not self.num_registers:
            return None
        return Tokens(append=hidden.new_zeros(1, self.num_registers, hidden.shape[2]))

    def hidden(self, site: HiddenCall, hidden: Tensor) -> Tensor | None:
        units = sorted({unit for layer, unit in self.neurons or () if layer == site.layer})
        if not units or (self.rest == "same" and not self.num_registers):
            return None
        if units[-1] >= hidden.shape[2]:
            raise AttnbiasError(
                f"TestTimeRegisters names neuron {units[-1]} of {site.site}, which has neurons 0 to"
                f" {hidden.shape[2] - 1}."
            )
        values = hidden[:, :, units]
        every = values.flatten(1)[..., None] if self.peak == "layer" else values
        largest = every.abs().argmax(1, keepdim=True)
        new = values.clone()
        patches = slice(self.prefix, site.length)
        new[:, patches] = self._rest(values[:, patches])
        new[:, site.added] = self.scale * every.gather(1, largest)
        index = torch.tensor(units, device=hidden.device)
        return hidden.index_copy(2, index, new)

    def _rest(self, patches: Tensor) -> Tensor:
        if self.rest == "same":
            return patches
        if self.rest == "zero":
            return torch.zeros_like(patches)
        mean = patches.mean(1, keepdim=True)
        if self.rest == "mean":
            return mean.expand_as(patches)
        return torch.where(patches > mean + patches.std(1, keepdim=True), mean, patches)

    def fit(
        self,
        model: nn.Module,
        images: Tensor | Iterable[Tensor | Mapping[str, Any]],
        *,
        top_k: int = 50,
        threshold: float | None = None,
        detect_layer: int = -1,
        highest_layer: int | None = None,
        sparse: bool = False,
        progress: bool = True,
    ) -> TestTimeRegisters:
        """Find the register neurons over a set of images; the rule that is returned is ready.

        Patches whose norm after `detect_layer` exceeds the threshold are outliers. A neuron's
        score is the mean of its absolute activation over the outliers of an image, then over the
        images that have some; the `top_k` best are kept.

        Args:
            model: a vision transformer in eval mode; it is left as it is.
            images: pixels ``(images, channels, height, width)``, batches of them, or the model's
                inputs for each batch. Published: 500 images.
            top_k: published: 50 for DINOv2-L, 10 for OpenCLIP-B/16.
            threshold: published: 150 for DINOv2-L, 30 for OpenCLIP-B/16. None takes three times
                the median norm; the work gives no rule for it, this one is ours.
            detect_layer: negative numbers count from the end. Published: -2 for DINOv2-L.
            highest_layer: the last layer to search; None: `detect_layer`. Published: 17 of 0 to 23
                for DINOv2-L, 5 of 0 to 11 for OpenCLIP-B/16.
            sparse: keep a neuron in an image only where at least half of its activations are below
                0.5 (the code's option).
            progress: show a bar (needs rich; silent without it).

        Cost: two forwards per batch; memory of one layer's hidden units.

        Raises:
            AttnbiasError: no images, numbers out of range, no patch above the threshold, no patch
                that stands out from the others.
        """
        from attnbias.steer.registers import find

        return find(
            self, model, images, top_k, threshold, detect_layer, highest_layer, sparse, progress
        )
