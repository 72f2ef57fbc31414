"""EAP-IG: what each part of a decoder hands to each later one, by integrated gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError, Refused
from attnbias.hub.layers import Parts, layers
from attnbias.hub.sites import unwrap
from attnbias.measures.circuits import head_matrices
from attnbias.steer.hidden import HiddenCall
from attnbias.steer.hooks import Vectors
from attnbias.steer.rule import Heads, Rule
from attnbias.steer.site import SiteCall

Edge = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class _Nodes(Rule):
    """Keeps what every node of one forward reads and writes, and changes nothing."""

    reads_hidden: ClassVar[bool] = True
    hidden_at: ClassVar[tuple[str, ...]] = ("attention", "mlp", "layer")
    heads: Heads = "all"
    found: dict[tuple[str, int], Any] = field(default_factory=dict)

    def vectors(self, site: SiteCall) -> Vectors | None:
        layer = site.site.layer
        self.found["input", layer] = site.hidden
        # Copies of its own for each head, so that gradients tell heads that share keys apart.
        own = Vectors(query=site.query * 1, key=site.key * 1, value=site.value * 1)
        self.found["vectors", layer] = (own.query, own.key, own.value)
        return own

    def outputs(self, site: SiteCall, out: Tensor) -> Tensor | None:
        self.found["heads", site.site.layer] = out
        return None

    def hidden(self, site: HiddenCall, hidden: Tensor) -> Tensor | None:
        self.found[site.at, site.layer] = hidden
        return None


def edges(
    model: nn.Module, pair: Mapping[str, Any], *, steps: int, tower: str
) -> dict[Edge, Tensor]:
    r"""The EAP-IG score of every edge, ``(rows,)`` each.

    .. math:: s(u \to v) = \left(u_{clean} - u_{corrupted}\right) \cdot
        \frac{1}{K} \sum_{k=0}^{K-1} \left.\frac{\partial D}{\partial\, \mathrm{in}(v)}
        \right|_{e = e_{corrupted} + \frac{k}{K} (e_{clean} - e_{corrupted})}

    with D the logit of the answer less that of the wrong one at the last token, e the token
    embeddings, and the product over tokens and size. Positive: the edge carries the answer.

    Nodes: ``"input"``, heads ``"a0.h3"``, MLPs ``"m0"``, ``"logits"``. A head reads by three edges:
    children ``"a1.h2<q>"``, ``"<k>"``, ``"<v>"``.

    Args:
        pair: ``"clean"`` and ``"corrupted"``, forwards of as many tokens; ``"answer"`` and
            ``"wrong"``, tokens ``(rows,)``.
        steps: K.

    Raises:
        Refused: a model whose layers do not add attention and then an MLP to one stream.
    """
    known = _sequential(model, tower)
    ends = _last(pair["clean"])
    clean, plain = _run(model, pair["clean"], None, tower)
    corrupted, other = _run(model, pair["corrupted"], None, tower)
    if plain.shape != other.shape:
        raise AttnbiasError(
            f"clean and corrupted must have as many tokens, got {tuple(plain.shape[:2])} and "
            f"{tuple(other.shape[:2])}."
        )
    gaps = _gaps(known, clean, corrupted)
    scores: dict[Edge, Tensor] = {}
    for step in range(steps):
        embeds = (other + step / steps * (plain - other)).requires_grad_()
        with torch.enable_grad():
            nodes, logits = _forward(model, pair["clean"], embeds, tower)
            own = logits[torch.arange(len(ends)), ends]
            rows = torch.arange(len(ends))
            gap = (own[rows, pair["answer"]] - own[rows, pair["wrong"]]).sum()
            reads = _reads(known, nodes, gap)
        for child, gradient in reads:
            for parent, change in gaps:
                if not _before(parent, child):
                    continue
                part = (change.double() * gradient.double()).sum((1, 2)) / steps
                scores[parent, child] = scores.get((parent, child), 0.0) + part
    return scores


def _run(
    model: nn.Module, inputs: Mapping[str, Any], embeds: Tensor | None, tower: str
) -> tuple[dict[tuple[str, int], Any], Tensor]:
    """What the nodes of a plain forward write, and its token embeddings."""
    root: Any = unwrap(model)
    with torch.no_grad():
        found, _ = _forward(model, inputs, None, tower)
        table: Tensor = root.get_input_embeddings()(inputs["input_ids"])
    return found, table.detach()


def _forward(
    model: nn.Module, inputs: Mapping[str, Any], embeds: Tensor | None, tower: str
) -> tuple[dict[tuple[str, int], Any], Tensor]:
    from attnbias.steer.context import steer
    from attnbias.steer.engine import never_skip

    given = dict(inputs)
    if embeds is not None:
        del given["input_ids"]
        given["inputs_embeds"] = embeds
    rule = _Nodes(towers=(tower,))
    with steer(model, rule), never_skip():  # the copies of queries and keys are what is attended
        logits: Tensor = model(**given).logits
    return rule.found, logits


def _gaps(
    known: dict[int, Parts], clean: dict[tuple[str, int], Any], corrupted: dict[Any, Any]
) -> list[tuple[str, Tensor]]:
    """What each node writes into the stream, clean less corrupted: ``(rows, tokens, size)``."""
    found = [("input", clean["input", 0] - corrupted["input", 0])]
    for layer, parts in known.items():
        writes = head_matrices(parts.core)[1]  # (heads, size, value size)
        change = clean["heads", layer] - corrupted["heads", layer]
        each = torch.einsum("hdv,bhnv->hbnd", writes, change)
        found += [(f"a{layer}.h{head}", each[head]) for head in range(len(each))]
        found.append((f"m{layer}", clean["mlp", layer] - corrupted["mlp", layer]))
    return found


def _reads(
    known: dict[int, Parts], nodes: dict[tuple[str, int], Any], gap: Tensor
) -> list[tuple[str, Tensor]]:
    """The gradient at what each node reads from the stream: ``(rows, tokens, size)``."""
    numbers = list(known)
    wanted: list[Tensor] = []
    for n in numbers:
        wanted += [*nodes["vectors", n], nodes["attention", n], nodes["layer", n]]
    given = torch.autograd.grad(gap, wanted, retain_graph=True, allow_unused=True)
    filled = [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, given, strict=True)]
    found = []
    for place, layer in enumerate(numbers):
        *vectors, middle, after = filled[5 * place : 5 * place + 5]
        for role, own, gradient in zip("qkv", nodes["vectors", layer], vectors, strict=True):
            heads = own.shape[1]
            chosen = torch.eye(heads, device=own.device, dtype=own.dtype)
            each = chosen[:, None, :, None, None] * gradient
            (back,) = torch.autograd.grad(
                own, nodes["input", layer], each, retain_graph=True, is_grads_batched=True
            )
            found += [(f"a{layer}.h{head}<{role}>", back[head]) for head in range(heads)]
        # The stream between attention and MLP goes on as it is, and into the MLP.
        found.append((f"m{layer}", middle - after))
    found.append(("logits", filled[-1]))
    return found


def _before(parent: str, child: str) -> bool:
    """Whether a node writes before another reads."""
    if parent == "input" or child == "logits":
        return True
    return _place(parent) < _place(child)


def _place(node: str) -> tuple[int, int]:
    layer = int(node[1:].split(".")[0])
    return layer, int(node[0] == "m")


def _sequential(model: nn.Module, tower: str) -> dict[int, Parts]:
    config: Any = unwrap(model).config
    known = {s.layer: p for s, p in layers(model).items() if s.tower == tower}
    parallel = any(
        getattr(config, word, False) for word in ("use_parallel_residual", "parallel_attn")
    )
    after = any(
        hasattr(p.layer, "post_feedforward_layernorm") or not p.sums or p.mlp is None
        for p in known.values()
    )
    if parallel or after or not known:
        raise Refused(
            f"{type(unwrap(model)).__name__}: edges are known for decoders whose layers add "
            "attention and then an MLP to one stream, with norms before both."
        )
    return known


def _last(inputs: Mapping[str, Any]) -> Tensor:
    """The slot of the last real token of each row."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    real = torch.ones_like(ids) if mask is None else mask
    return torch.where(real.bool(), torch.arange(ids.shape[1], device=ids.device), 0).amax(1)
