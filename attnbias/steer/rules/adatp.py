"""AdaTP: visual tokens of a video are dropped between layers, with two debiasing modules."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from attnbias.errors import AttnbiasError, Refused
from attnbias.steer.budget import chosen, shared_out
from attnbias.steer.hidden import TokenCall
from attnbias.steer.hooks import Tokens
from attnbias.steer.rule import Heads, Rule, is_number
from attnbias.steer.site import SiteCall


@dataclass(frozen=True)
class Clip:
    """What `AdaTP.measure` found of one video.

    Attributes:
        similar: cosine of each frame's features with the next frame's: one fewer than frames.
        relevant: cosine of each frame's features with the text's.
    """

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012 - read by pydantic

    similar: tuple[float, ...]
    relevant: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.similar) + 1 != len(self.relevant):
            raise AttnbiasError(
                "a clip of n frames has n - 1 similarities and n relevances, got "
                f"{len(self.similar)} and {len(self.relevant)}."
            )


@dataclass(frozen=True, kw_only=True)
class AdaTP(Rule):
    r"""Drop most visual tokens between layers, ranked by attention whose two biases are taken out.

    .. math:: \text{segment starts at frame } f \iff \cos(g_{f-1}, g_f) < \tau_s, \qquad
        k_s \propto n_s\,(b \text{ if } \overline{\cos}(g_f, t)_{f \in s} \ge
        \overline{\cos}(g_f, t)_f \text{ else } 1), \qquad \textstyle\sum_s k_s = [\rho_l N]

    Before layer ``l`` of a stage, each segment keeps its ``k_s`` tokens with the most attention
    from the text in layer ``l - 1``, counted inside the segment (global debias: a ranking over the
    whole video prefers its ends). In layers before `shallow` a place in the frame that a segment
    already keeps is passed over in its other frames until every place has been kept once (local
    debias). The layer and all after it run without the rest; their caches do not hold it.

    Args:
        video: spans of the visual tokens, in order; the frames share them evenly.
        text: span of the tokens whose attention ranks; None: the last token alone.
        stages: ``(layer, share)``: before `layer`, counted from 0 and at least 1, ``share`` of all
            visual tokens is left. Layers ascend and shares do not rise; share 1 drops nothing.
        tau: a frame less similar than this to the one before starts a segment; -1: one segment.
        boost: how many times the share of others a relevant segment gets; 1: all alike.
        shallow: local debias before layers below this number; 0: never.
        clips: what `measure` found, one for all rows or one per prompt.
        heads: the heads whose attention ranks, averaged. layers, towers, phase: see `Rule`.

    Cost: one row of attention per text token at each stage, O(text x keys), and less in every later
    layer: with share r a layer's MLP costs r of its own, its attention about r².

    Raises:
        Refused: steering before `measure`; rows of a batch with unlike numbers of visual tokens; a
            prompt whose video and text come in different chunks.
        AttnbiasError: frames that do not divide the tokens, layers that the model has not.

    Source: after AdaTP: Attention-Debiased Token Pruning for Video Large Language Models, 2025
    (arXiv 2505.20100), abstract only; no code of the authors was found. From it: segments by the
    similarity of global frame features, relevance by a text encoder beside the model, ranking
    inside segments, passing over kept places in shallow layers, pruning at several layers, 27.3 %
    of the FLOPs for a model of 28 layers. Chosen here: `tau`, `boost`, what is relevant (at least
    the mean of the video), that a budget is divided in proportion, the text tokens that rank, the
    order in which places may repeat, and the stages, whose mean share of visual tokens over 28
    layers is 27.5 %.
    """

    heads: Heads = "all"
    video: tuple[str, ...] = ("video",)
    text: str | None = "question"
    stages: tuple[tuple[int, float], ...] = ((2, 0.4), (8, 0.2), (14, 0.15))
    tau: float = 0.85
    boost: float = 2.0
    shallow: int = 8
    clips: tuple[Clip, ...] = ()

    row_local: ClassVar[bool] = False
    drops_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        video = (self.video,) if isinstance(self.video, str) else tuple(self.video)
        object.__setattr__(self, "video", video)
        object.__setattr__(self, "stages", tuple(tuple(stage) for stage in self.stages))
        for layer, share in self.stages:
            if not is_number(layer) or layer < 1 or not 0 < share <= 1:
                raise AttnbiasError(
                    "stages must be (layer from 1, share above 0 up to 1), got "
                    f"({layer!r}, {share!r})."
                )
        if any(a[0] >= b[0] or a[1] < b[1] for a, b in pairwise(self.stages)):
            raise AttnbiasError(
                f"stages must have ascending layers and falling shares, got {self.stages!r}."
            )
        if not video or not self.stages or not self.boost >= 1 or not -1 <= self.tau <= 1:
            raise AttnbiasError(
                "AdaTP needs video spans, stages, boost of at least 1 and tau from -1 to 1, got "
                f"{self.video!r}, {self.stages!r}, {self.boost!r} and {self.tau!r}."
            )

    @property
    def needs(self) -> tuple[str, ...]:
        return self.video if self.text is None else (*self.video, self.text)

    def ready(self) -> None:
        if not self.clips:
            raise Refused(
                "AdaTP has not seen the video: run rule = rule.measure(frames, text) with features "
                "of the frames and of the text from one encoder pair, such as CLIP."
            )

    def named_layers(self) -> set[int]:
        return Rule.named_layers(self) | {layer for layer, _ in self.stages}

    def measure(self, frames: Tensor, text: Tensor) -> AdaTP:
        """The rule for given videos and questions.

        Args:
            frames: ``(frames, dim)`` or ``(rows, frames, dim)``: one global feature per frame.
            text: ``(dim,)`` or ``(rows, dim)``, in the same space.
        """
        frames, text = (
            (frames[None] if frames.ndim == 2 else frames),
            text.reshape(-1, text.shape[-1]),
        )
        fits = frames.ndim == 3 and frames.shape[::2] == text.shape and frames.shape[1] > 0
        if not fits:
            raise AttnbiasError(
                "measure needs frames (rows, frames, dim) and text (rows, dim), got "
                f"{tuple(frames.shape)} and {tuple(text.shape)}."
            )
        frames, text = frames.double(), text.double()
        similar = cosine_similarity(frames[:, :-1], frames[:, 1:], dim=-1)
        relevant = cosine_similarity(frames, text[:, None], dim=-1)
        rows = zip(similar.tolist(), relevant.tolist(), strict=True)
        return replace(self, clips=tuple(Clip(tuple(a), tuple(b)) for a, b in rows))

    def segments(self, clip: Clip) -> tuple[list[int], list[float]]:
        """The segment of each frame, and the weight of each segment's tokens."""
        numbers = [0]
        for value in clip.similar:
            numbers.append(numbers[-1] + (value < self.tau))
        count, mean = numbers[-1] + 1, sum(clip.relevant) / len(clip.relevant)
        own: list[list[float]] = [[] for _ in range(count)]
        for number, value in zip(numbers, clip.relevant, strict=True):
            own[number].append(value)
        return numbers, [self.boost if sum(v) / len(v) >= mean - 1e-9 else 1.0 for v in own]

    def look(self, site: SiteCall) -> Any:
        """``(positions, attention)`` of the keys ``(batch, keys)``, before each stage."""
        stage = any(layer == site.site.layer + 1 for layer, _ in self.stages)
        if site.phase == "decode" or not stage or not bool(site.where(self.video).any()):
            return None
        batch = site.shape[0]
        if self.text is None:
            rows, weight = site.last[:, None], torch.ones(batch, 1, device=site.device)
        else:
            asked = site.where_queries((self.text,)).expand(batch, -1)
            most = int(asked.sum(1).max())
            if most == 0 or not bool(asked.any(1).all()):
                raise Refused(
                    f"AdaTP ranks by the attention of {self.text!r}, which is not in this forward: "
                    "run the prompt in one piece."
                )
            rows = asked.int().sort(dim=1, descending=True, stable=True).indices[:, :most]
            weight = asked.gather(1, rows).to(site.dtype)
        with torch.no_grad():
            seen = site.attention(rows).mean(1)
            mean = (seen * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
        return site.key_positions.expand(batch, -1), mean

    def tokens(self, site: TokenCall, hidden: Tensor) -> Tokens | None:
        share = dict(self.stages).get(site.layer, 1.0)
        here = site.where(self.video).expand(site.batch, -1)
        if share == 1 or site.phase == "decode" or not bool(here.any()):
            return None
        self.ready()
        positions = site.positions.expand(site.batch, -1)
        every = torch.arange(int(positions.max()) + 1, device=hidden.device)[None]
        video = site.spans.chosen(self.video, every, site.batch).expand(site.batch, -1)
        order = video.cumsum(1) - 1
        counts = video.sum(1).tolist()
        if len(set(counts)) > 1:
            raise Refused(
                f"AdaTP: the rows have {', '.join(map(str, counts))} visual tokens, and rows of "
                "one batch must keep the same number: run them one by one."
            )
        scores = self._scores(site, positions)
        if site.batch % len(self.clips):
            raise Refused(f"AdaTP measured {len(self.clips)} videos and runs {site.batch} rows.")
        keep = ~here
        for row in range(site.batch):
            clip = self.clips[row * len(self.clips) // site.batch]
            frames, total = len(clip.relevant), counts[row]
            if total % frames:
                raise AttnbiasError(f"{total} visual tokens are not divided by {frames} frames.")
            places = here[row].nonzero()[:, 0]
            number = order[row][positions[row][places]]
            numbers, weights = self.segments(clip)
            segment = torch.tensor(numbers, device=hidden.device)[number // (total // frames)]
            sizes = segment.bincount(minlength=len(weights)).tolist()
            shares = [weights[n] * numbers.count(n) for n in range(len(weights))]
            budget = shared_out(min(round(share * total), len(places)), shares, sizes)
            same = number % (total // frames) if site.layer < self.shallow else None
            keep[row, places[chosen(scores[row][places], segment, budget, same)]] = True
        return Tokens(keep=keep)

    def _scores(self, site: TokenCall, positions: Tensor) -> Tensor:
        """The attention that each token of the layer got in the layer before."""
        for other, found in site.looked.items():
            if (other.tower, other.layer) == (site.tower, site.layer - 1):
                keys, seen = found
                table = seen.new_zeros(site.batch, int(positions.max()) + 2)
                # The last entry takes what has no position: padding, empty slots.
                keys = torch.where(keys < 0, table.shape[1] - 1, keys)
                table = table.scatter(1, keys, seen)
                here: Tensor = table.gather(1, positions.clamp(min=0))
                return here
        raise Refused(
            f"AdaTP needs the attention of layer {site.layer - 1}: let `layers` name it, too."
        )
