"""Reference frames: whether attention is anchored on one token, on several, or on both ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.measures._maps import attention_maps
from attnbias.measures._residual import main_tower
from attnbias.measures.base import Data, Measure, bar, evaluating, forwards

Type = Literal["centralised", "distributed", "bidirectional", "none"]
LEAST_ANCHORED = 0.1  # less of all attention on anchors than this is no frame
END, DOMINANT = 0.2, 0.5  # shares of the anchored attention: each end's, the largest token's


@dataclass(frozen=True)
class Frame:
    """What `ReferenceFrame` found.

    Attributes:
        tower: of the model. layers: its layers. quantiles: the thresholds of the graphs.
        anchored: ``(samples, tokens)``: the share of all attention that each token gets from the
            heads of which it is an anchor; mean over layers and heads.
        concentration: ``(samples, layers)``: the share of attention on anchors.
        connectivity: ``(samples, layers, quantiles)``: algebraic connectivity of the graph.
        centralisation: the same shape: Freeman's degree centralisation, 1 for a star.
        components, cycles: the same shape: Betti numbers 0 and 1 of the graph.
    """

    tower: str
    layers: tuple[int, ...]
    quantiles: tuple[float, ...]
    anchored: Tensor
    concentration: Tensor
    connectivity: Tensor
    centralisation: Tensor
    components: Tensor
    cycles: Tensor

    @property
    def types(self) -> tuple[Type, ...]:
        """The type of each sample."""
        return tuple(frame_type(row[~row.isnan()]) for row in self.anchored)

    @property
    def type(self) -> Type:
        """The type of most samples."""
        return Counter(self.types).most_common(1)[0][0]

    def __str__(self) -> str:
        count = self.types.count(self.type)
        return (
            f"Reference frame of {self.tower}: {self.type} ({count} of {len(self.types)} samples); "
            f"{float(self.concentration.mean()):.1%} of attention on anchors."
        )


@dataclass(frozen=True)
class ReferenceFrame(Measure):
    r"""Where attention is anchored, and the shape of its graph.

    In each head a token k is an anchor where it receives clearly more than it would if every query
    attended evenly to what it sees:

    .. math:: \frac{\alpha_k - e_k}{1 - e_k} > \mathrm{excess}, \qquad
              \alpha_k = \frac{1}{|V_k|} \sum_{i \in V_k} A_{ik}, \qquad
              e_k = \frac{1}{|V_k|} \sum_{i \in V_k} \frac{1}{n_i}

    with :math:`V_k` the queries that see k (at least a quarter of the text) and :math:`n_i` the
    number of keys that query i sees. From the share of all attention that goes to anchors, by
    token, follows the type of a text: *bidirectional* (the first and the last token have a fifth of
    it each), *centralised* (one token has at least half), *distributed* (anything else), *none* (it
    is less than a tenth of all attention).

    Beside it, by layer (mean over heads), the graph of the pairs of tokens whose attention
    :math:`(A_{ik} + A_{ki}) / 2` is above a quantile of all pairs: algebraic connectivity (the
    second smallest eigenvalue of :math:`D - W`), degree centralisation
    :math:`\sum_i (d_{\max} - d_i) / ((n - 1)(n - 2))`, and the Betti numbers 0 (components) and 1
    (independent cycles: edges - tokens + components; triangles are not filled).

    Args:
        excess: how far above the even share, as a part of the way to 1, makes an anchor.
        quantiles: thresholds of the graphs, all reported, since the source's is not known for sure.
        tower: by default the text tower, else the first.

    Cost: one forward and the whole maps of each entry of the data: for sentences (6 to 50 tokens in
    the source, 500 of them); O(tokens^3) for each head and quantile.

    Raises:
        AttnbiasError: no data, a text of fewer than 3 tokens, parameters out of range.

    Source: What are you sinking? A geometric approach on attention sink, 2025 (arXiv 2508.02546);
    abstract only: "after" it. Its three types and the names of its diagnostics are its own. What an
    anchor is, the rule from anchors to types with its three numbers, the symmetric unweighted graph
    and the quantiles were chosen here. Its Fisher information, random-matrix spectra over
    checkpoints and KL reduction are not part of this.
    """

    name: ClassVar[str] = "reference_frame"
    excess: float = 0.1
    quantiles: Sequence[float] = (0.8, 0.85, 0.9, 0.95)
    tower: str | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.excess, (int, float)) and 0 < self.excess < 1):
            raise AttnbiasError(
                f"ReferenceFrame(excess) must lie between 0 and 1, got {self.excess!r}."
            )
        found = tuple(self.quantiles)
        if not found or not all(isinstance(q, float) and 0 < q < 1 for q in found):
            raise AttnbiasError(
                f"ReferenceFrame(quantiles) must be numbers between 0 and 1, got {found!r}."
            )
        object.__setattr__(self, "quantiles", found)

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> Frame:
        given, tower = forwards(data, "ReferenceFrame"), main_tower(model, self.tower)
        anchored, graphs = list[Tensor](), list[Tensor]()
        concentration, layers = list[Tensor](), tuple[int, ...]()
        with evaluating(model), bar(len(given), self.name, progress) as tick:
            for inputs in given:
                layers, maps = attention_maps(model, inputs, tower)
                for row in maps:
                    real = ~row.isnan().all(-1).flatten(0, 1).all(0)
                    count = int(real.sum())
                    if count < 3:
                        raise AttnbiasError(
                            f"ReferenceFrame: a text needs 3 tokens or more, got {count}."
                        )
                    whole = row[:, :, :count, :count]
                    mass = anchors(whole, self.excess)  # (layers, heads, tokens)
                    anchored.append(mass.nanmean((0, 1)).cpu())
                    concentration.append(mass.sum(-1).nanmean(1).cpu())
                    graphs.append(self._graphs(whole).nanmean(2).cpu())
                tick()
        size = max(len(part) for part in anchored)
        padded = [
            nn.functional.pad(part, (0, size - len(part)), value=torch.nan) for part in anchored
        ]
        shape = torch.stack(graphs).movedim(1, 0)  # (4, samples, layers, quantiles)
        return Frame(
            tower,
            layers,
            tuple(self.quantiles),
            torch.stack(padded),
            torch.stack(concentration),
            *shape.unbind(0),
        )

    def _graphs(self, maps: Tensor) -> Tensor:
        """(4, layers, heads, quantiles)."""
        return torch.stack([graph_numbers(maps, float(q)) for q in self.quantiles], -1)


def anchors(maps: Tensor, excess: float) -> Tensor:
    """(..., tokens): the share of all attention on each token that is an anchor, else 0; from maps
    ``(..., queries, keys)``."""
    count = maps.shape[-1]
    causal = not bool((maps.triu(1) > 0).any())
    sees = maps.new_ones(count, count)
    sees = sees.tril() if causal else sees
    queries = sees.sum(0)  # that see each key
    even = (sees / sees.sum(1, keepdim=True)).sum(0) / queries
    received = maps.sum(-2)
    far = received / queries - even > excess * (1 - even)
    chosen = far & (queries >= count / 4)
    return torch.where(chosen, received / count, 0.0)


def graph_numbers(maps: Tensor, quantile: float) -> Tensor:
    """Connectivity, centralisation, components and cycles ``(4, ...)`` of maps ``(..., n, n)``."""
    count = maps.shape[-1]
    weight = ((maps + maps.transpose(-2, -1)) / 2).nan_to_num(0.0)
    above = torch.ones(count, count, dtype=torch.bool, device=maps.device).triu(1)
    least = weight[..., above].quantile(quantile, dim=-1)
    edges = (weight > least[..., None, None]) & (above | above.T)
    degree = edges.sum(-1).double()
    laplacian = torch.diag_embed(degree) - edges.double()
    values = torch.linalg.eigvalsh(laplacian)
    components = (values < 1e-8).sum(-1).double()
    centre = (degree.amax(-1, keepdim=True) - degree).sum(-1) / ((count - 1) * (count - 2))
    cycles = degree.sum(-1) / 2 - count + components
    found = torch.stack([values[..., 1].clamp_min(0.0), centre, components, cycles])
    return found.masked_fill(maps.isnan().any(-1).any(-1), torch.nan)


def frame_type(anchored: Tensor) -> Type:
    """The type of one text from the anchored share of attention of its tokens."""
    total = float(anchored.sum())
    if total < LEAST_ANCHORED:
        return "none"
    share = anchored / total
    if float(share[0]) >= END and float(share[-1]) >= END:
        return "bidirectional"
    return "centralised" if float(share.max()) >= DOMINANT else "distributed"
