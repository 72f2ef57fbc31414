"""Documents of a prompt by the attention they get, less what their places alone would get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError, Refused
from attnbias.steer.rule import Heads, Rule, Towers, is_number
from attnbias.steer.site import SiteCall
from attnbias.steer.spans import Keys, Range, Spans, keys_of

if TYPE_CHECKING:
    from attnbias.hub.prompt import Prompt


@dataclass(frozen=True)
class Ranking:
    """Documents with their attention, the bias of their places, and the difference of the two.

    Attributes:
        documents: names of spans, positions or ranges, in the order of the prompt.
        sizes: their numbers of tokens.
        attention: mean attention per token of each document, from the last token of the prompt,
            over all layers and heads. bias: the same with a dummy document in its place.
        depth: how many layers the tower has.
    """

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012 - read by pydantic

    documents: Keys
    sizes: tuple[int, ...]
    attention: tuple[float, ...]
    bias: tuple[float, ...]
    depth: int

    @property
    def relevance(self) -> tuple[float, ...]:
        """Attention less bias: the calibrated relevance, up to a constant."""
        return tuple(a - b for a, b in zip(self.attention, self.bias, strict=True))

    @property
    def order(self) -> Keys:
        """The documents, the most relevant first."""
        scores = self.relevance
        places = sorted(range(len(scores)), key=lambda k: -scores[k])
        return tuple(self.documents[k] for k in places)


def rank_documents(
    model: nn.Module,
    prompt: Prompt,
    *,
    dummy: Sequence[int],
    documents: Any = None,
    towers: Towers = None,
) -> Ranking:
    r"""Rank the documents of a prompt by calibrated attention.

    .. math:: \mathrm{rel}_k = A(\text{document}_k, k) - A(\text{dummy}, k)

    with A the mean attention per token that slot k gets from the last token of the prompt, over all
    layers and heads. The dummy fills one slot at a time, the other documents stay.

    Args:
        model: in eval mode; it is left as it is.
        prompt: what ``ab.prompt(tokenizer, ..., documents=...)`` returns.
        dummy: token ids without content, repeated to the length of each document so that nothing
            else in the prompt moves, such as
            ``tokenizer("dummy", add_special_tokens=False).input_ids``.
        documents: names of spans, positions or ranges, one per document; by default the spans
            "document 0", "document 1" and so on.
        towers: the tower that reads the prompt, where there are several.

    Cost: (1 + documents) forwards of the prompt; one row of attention in each layer.

    Raises:
        AttnbiasError: no documents, a document without tokens, a dummy that is no list of ids.
        Refused: several towers and none is named.

    Source: Found in the Middle: Calibrating Positional Attention Bias Improves Long Context
    Utilization, 2024 (arXiv 2406.16008); equations read, in an independent account of the paper.
    Their prompts repeat the question before the documents (here: ``system=question``). Chosen here:
    the dummy has the length of what it replaces.
    """
    from attnbias.hub.device import runs_on
    from attnbias.steer.states import evaluating, tower_of

    evaluating(model)
    ids = [] if isinstance(dummy, str) else list(dummy)
    if not ids or not all(map(is_number, ids)):
        raise AttnbiasError(
            'dummy must be token ids such as tokenizer("dummy", add_special_tokens=False).input_ids'
            f", got {dummy!r}."
        )
    chosen = documents_of(prompt.spans) if not documents else keys_of(documents)
    spans = Spans(prompt.spans)
    tower = tower_of(_Look(documents=chosen, towers=towers), model)
    device = runs_on(model)
    inputs = {name: value.to(device) for name, value in prompt.inputs.items()}
    positions = _positions(inputs)
    slots = [spans.chosen((one,), positions, 1)[0].nonzero()[:, 0] for one in chosen]
    sizes = tuple(map(len, slots))
    if 0 in sizes:
        raise AttnbiasError(f"the document {chosen[sizes.index(0)]!r} has no token in this prompt.")
    attention, depth = _measure(model, inputs, chosen, tower, prompt.spans)
    bias = []
    for number, slot in enumerate(slots):
        filler = torch.tensor(ids, device=device).repeat(-(-len(slot) // len(ids)))
        filled = inputs["input_ids"].clone()
        filled[0, slot] = filler[: len(slot)]
        given = {**inputs, "input_ids": filled}
        bias.append(_measure(model, given, chosen, tower, prompt.spans)[0][number])
    return Ranking(chosen, sizes, attention, tuple(bias), depth)


def documents_of(spans: Any) -> Keys:
    """The spans "document 0", "document 1" and so on, in order."""
    names: list[str] = []
    while f"document {len(names)}" in spans:
        names.append(f"document {len(names)}")
    if not names:
        raise AttnbiasError(
            "the prompt names no documents: write ab.prompt(tokenizer, question, documents=[...]), "
            "or documents=... with names of spans or ranges."
        )
    return tuple(names)


def members(documents: Keys, site: SiteCall) -> Tensor:
    """The number of the document that each key belongs to, from 1; 0 for none."""
    groups = torch.zeros_like(site.key_positions)
    for number, one in enumerate(documents, 1):
        groups = torch.where(site.where((one,)), number, groups)
    return groups


@dataclass(frozen=True, kw_only=True)
class _Look(Rule):
    """Sees how much attention the last token of a prompt pays to each document."""

    heads: Heads = "all"
    documents: tuple[str | int | Range, ...]
    found: list[Tensor] = field(default_factory=list)

    def look(self, site: SiteCall) -> Any:
        row = site.attention(site.last[:, None])[0, :, 0]  # (heads, keys)
        group = members(self.documents, site)[0]
        parts = [row[:, group == k].mean(-1) for k in range(1, len(self.documents) + 1)]
        self.found.append(torch.stack(parts, -1).double())
        return None


def _measure(
    model: nn.Module, inputs: dict[str, Any], documents: Keys, tower: str, spans: Any
) -> tuple[tuple[float, ...], int]:
    """Mean attention per token of each document, and the number of layers."""
    from attnbias.steer.context import steer

    look = _Look(documents=documents, towers=(tower,))
    with torch.no_grad(), steer(model, look, spans=spans):
        model(**inputs)
    return tuple(torch.cat(look.found).mean(0).tolist()), len(look.found)


def _positions(inputs: dict[str, Any]) -> Tensor:
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[0] != 1:
        raise Refused("a prompt must hold input_ids of one row: make it by ab.prompt(...).")
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return torch.arange(ids.shape[1], device=ids.device)[None]
    return torch.where(mask > 0, mask.cumsum(-1) - 1, -1)
