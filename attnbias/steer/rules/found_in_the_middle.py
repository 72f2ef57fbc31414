"""Found in the middle: share the attention on documents by relevance, not by place."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError, Refused
from attnbias.steer.documents import Ranking, members, rank_documents
from attnbias.steer.rule import Rule, is_number
from attnbias.steer.site import SiteCall
from attnbias.steer.spans import Keys, keys_of

if TYPE_CHECKING:
    from attnbias.hub.prompt import Prompt


@dataclass(frozen=True, kw_only=True)
class FoundInTheMiddle(Rule):
    r"""Rescale the attention on each document to its calibrated relevance.

    .. math:: a'_{i,kj} = C_i\, \frac{\alpha_k}{A_i(k)}\, a_{i,kj}, \quad
              \alpha = \mathrm{softmax}(\mathrm{rel} / t), \quad
              A_i(k) = \frac{1}{n_k} \sum_{j} a_{i,kj}

    for token j of document k, which has :math:`n_k` tokens; :math:`C_i` keeps the attention of row
    i on all documents together. Ratios inside a document stay. The relevance is measured for each
    prompt by `rank_documents`: attention less what a dummy gets in the same place.

    Args:
        dummy: token ids without content, see `rank_documents`; () until they are given.
        temperature: t, in units of attention per token (5e-5, for prompts of some thousand tokens;
            attention per token falls with length, so short prompts want more: with 5e-5 they leave
            one document all the attention).
        last: the share of the layers that is edited, from the end, where `layers` names none (the
            last 16 of 32: earlier ones make the text unstable).
        strength: 1 as published; between 0 and 1 the shares are mixed with the old ones.
        documents: names of spans or ranges, one per document; () for "document 0" and so on.
        ranking: what was measured of one prompt, filled in by `prepare`.
        heads, layers, towers, phase: see `Rule`; all heads, as published, is ``heads="all"``.

    Rows after the documents are edited, and those of the tokens that are generated; all rows where
    another tower reads the documents. A document that a row does not see gets nothing.

    Cost: (1 + documents) forwards for each prompt; then two attention calls on the chosen heads
    more; memory O(keys).

    Raises:
        Refused: no dummy; steering without a prompt.
        AttnbiasError: a number out of range.

    Source: Found in the Middle: Calibrating Positional Attention Bias Improves Long Context
    Utilization, 2024 (arXiv 2406.16008); equations read, in independent accounts of the paper. Left
    open there and chosen here: which rows are edited, that A is taken row by row and head by head
    (so that the shares hold exactly), `strength`, and the dummy's length.
    """

    dummy: tuple[int, ...] = ()
    temperature: float = 5e-5
    last: float = 0.5
    strength: float = 1.0
    documents: Keys = ()
    ranking: Ranking | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "dummy", tuple(self.dummy))
        if not all(map(is_number, self.dummy)):
            raise AttnbiasError(f"dummy must hold token ids, got {self.dummy!r}.")
        if self.documents:
            object.__setattr__(self, "documents", keys_of(self.documents))
        for name, low, high in (
            ("temperature", 0.0, math.inf),
            ("last", 0.0, 1.0),
            ("strength", -math.inf, 1.0),
        ):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            inside = number and math.isfinite(value) and low < value <= high
            if not inside or (name == "strength" and value < 0):
                wanted = "from 0 to 1" if name == "strength" else f"above 0 and at most {high:g}"
                raise AttnbiasError(f"{name} must be {wanted}, got {value!r}.")

    def ready(self) -> None:
        if not self.dummy and self.ranking is None:
            raise Refused(
                "FoundInTheMiddle has no dummy document: write FoundInTheMiddle(heads='all', "
                'dummy=tokenizer("dummy", add_special_tokens=False).input_ids).'
            )

    def prepare(self, model: nn.Module, prompt: Prompt) -> FoundInTheMiddle:
        """The rule for one prompt: its documents are measured with `rank_documents`."""
        found = rank_documents(
            model, prompt, dummy=self.dummy, documents=self.documents, towers=self.towers
        )
        return replace(self, ranking=found)

    @property
    def prepared(self) -> bool:
        return self.ranking is not None

    @property
    def needs(self) -> tuple[str, ...]:
        found = self.documents if self.ranking is None else self.ranking.documents
        return tuple(one for one in found if isinstance(one, str))

    def acts_in(self, tower: str, layer: int, phase: str) -> bool:
        named = self.layers != "all" or bool(self.named_layers())
        depth = 0 if self.ranking is None else self.ranking.depth
        late = layer >= depth - math.ceil(self.last * depth)
        return super().acts_in(tower, layer, phase) and (named or late)

    def groups(self, site: SiteCall) -> Tensor:
        return members(self._measured().documents, site)[:, None]

    def group_count(self, site: SiteCall, groups: Tensor) -> int:
        return 1 + len(self._measured().documents)

    def queries(self, site: SiteCall) -> Tensor | None:
        return self._rows(site, members(self._measured().documents, site))

    def reallocate(self, site: SiteCall, masses: Tensor) -> Tensor | None:
        if self.strength == 0:
            return None
        found = self._measured()
        groups = members(found.documents, site)
        relevance = torch.tensor(found.relevance, dtype=torch.float64, device=masses.device)
        alpha = (relevance / self.temperature).softmax(-1)
        # Sizes of whole documents: a sliding window's cache may have dropped a part.
        sizes = torch.tensor(found.sizes, device=masses.device)
        weight = torch.where(masses[..., 1:] > 0, (sizes * alpha).to(masses), 0.0)
        whole = weight.sum(-1, keepdim=True)
        on = (whole > 0) & self._rows(site, groups)[:, None, :, None]
        shares = weight / torch.where(whole > 0, whole, 1.0)
        new = shares * masses[..., 1:].sum(-1, keepdim=True)
        new = torch.where(on, torch.lerp(masses[..., 1:], new, self.strength), masses[..., 1:])
        return torch.cat([masses[..., :1], new], -1)

    def _rows(self, site: SiteCall, groups: Tensor) -> Tensor:
        """The rows that are edited: bool ``(batch | 1, queries)``."""
        if site.site.kind == "cross":
            return site.query_positions >= 0
        end = torch.where(groups > 0, site.key_positions, -1).amax(-1, keepdim=True)
        return site.query_positions > end

    def _measured(self) -> Ranking:
        if self.ranking is None:
            raise Refused("FoundInTheMiddle was not prepared for this prompt.")
        return self.ranking
