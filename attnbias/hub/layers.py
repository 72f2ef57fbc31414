"""Where a layer is: its block, the two sub-blocks, the hidden units of its MLP; found by name."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from attnbias.errors import Refused
from attnbias.hub.sites import Site, find, unwrap

PLACES = ("layer", "mlp", "attention", "neurons")

# The last module of the MLP before the residual add, and its down projection, whose input are the
# hidden units after the activation. The first row of which both exist is taken.
_MLPS = (
    ("post_feedforward_layernorm", "mlp.down_proj", "pre_feedforward_layernorm"),  # Gemma 2, 3
    ("layer_scale2", "mlp.fc2", ""),  # DINOv2
    ("layer_scale2", "mlp.down_proj", ""),  # DINOv2 with SwiGLU
    ("layer_scale2", "mlp.weights_out", ""),  # the same before transformers 5.3
    ("mlp", "mlp.down_proj", ""),  # Llama, Qwen, Mistral, Phi-3, Qwen2.5-VL
    ("mlp", "mlp.fc2", ""),  # CLIP, ViT, SigLIP, Qwen2-VL
    ("mlp", "mlp.c_proj", ""),  # GPT-2
    ("mlp", "mlp.dense_4h_to_h", ""),  # GPT-NeoX
    ("mlp", "mlp.Wo", ""),  # ModernBERT
    ("output.dense", "output.dense", "intermediate"),  # BERT; ViT before transformers 5.3
    ("fc2", "fc2", "fc1"),  # OPT, BART
)
_ATTENTIONS = (
    ("post_attention_layernorm", "pre_feedforward_layernorm"),  # Gemma 2, 3
    ("layer_scale1", "layer_scale2"),  # DINOv2
    ("attention.output.dense", "attention.output"),  # BERT; ViT before transformers 5.3
)
_NORM_LAST = ("output.LayerNorm", "output.layer_norm", "fc2")


@dataclass(frozen=True)
class Parts:
    """The modules around one attention site.

    Attributes:
        layer: the block: its first output is the residual stream after the layer.
        core: the module that attends. above: the modules that contain the layer, innermost first.
        attention, mlp: the modules whose (first) output is added to the residual stream.
        neurons: the MLP's down projection. mlp and neurons are None where they are not known.
        sums: whether the layer's output must be its input + attention + mlp. Not where a norm
            comes after the sum (BERT, BART, OPT-350m).
    """

    site: Site
    layer: nn.Module
    core: nn.Module
    above: tuple[nn.Module, ...]
    attention: nn.Module
    mlp: nn.Module | None
    neurons: nn.Module | None
    sums: bool

    @property
    def placed(self) -> bool:
        """Whether attention knows where tokens are: by relative positions or in windows."""
        names = [name for name, _ in self.layer.named_modules()]
        names += [name for name, _ in self.layer.named_parameters()]
        return hasattr(self.layer, "window_size") or any("relative_position" in n for n in names)

    def module(self, place: str) -> nn.Module:
        """The module of one of `PLACES`.

        Raises:
            Refused: the layer has no such module that is known.
        """
        found: nn.Module | None = getattr(self, place)
        if found is not None:
            return found
        experts = any(hasattr(module, "experts") for module in self.layer.children())
        why = (
            "its MLP is a mixture of experts, whose hidden units exist for some tokens only"
            if place == "neurons" and experts
            else "its MLP has no module that is known"
        )
        raise Refused(
            f"{type(self.layer).__name__} ({self.site}): {why}, so {place!r} cannot be edited "
            "there; 'layer' can."
        )


def layers(model: nn.Module) -> dict[Site, Parts]:
    """The modules of every layer that attends to itself, by site.

    A layer is the nearest element of a list of modules that holds the attention module. A site in
    no such list (a pooling head) is left out.
    """
    root = unwrap(model)
    modules = dict(root.named_modules())
    names = {id(module): name for name, module in modules.items()}
    found: dict[Site, Parts] = {}
    for entry in find(root):
        if entry.site.kind == "cross":
            continue
        path = names[id(entry.module)].split(".")
        for length in range(len(path), 0, -1):
            if isinstance(modules[".".join(path[: length - 1])], nn.ModuleList):
                break
        else:
            continue
        layer = modules[".".join(path[:length])]
        outer = modules.get(".".join(path[: max(length - 3, 0)]))
        if isinstance(outer, nn.ModuleList) and _mlp(layer)[0] is None:
            # T5: a layer is itself a list of sub-blocks (in Swin the inner list holds layers).
            layer = modules[".".join(path[: length - 2])]
        attention = modules[".".join(path[: length + 1])]
        for last, witness in _ATTENTIONS:
            module = _part(layer, last)
            if module is not None and _part(layer, witness) is not None:
                attention = module
                break
        above = [modules[".".join(path[:count])] for count in range(length - 1, -1, -1)]
        found[entry.site] = Parts(
            entry.site,
            layer,
            entry.module,
            tuple(above),
            attention,
            *_mlp(layer),
            not any(_part(layer, name) is not None for name in _NORM_LAST),
        )
    return found


def _mlp(layer: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    for last, down, witness in _MLPS:
        modules = _part(layer, last), _part(layer, down)
        if None not in modules and (not witness or _part(layer, witness) is not None):
            return modules
    mlp = _part(layer, "mlp")
    last_norm = _part(layer, "post_feedforward_layernorm")
    return (mlp if last_norm is None else None), None


def _part(layer: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = layer
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
    return module
