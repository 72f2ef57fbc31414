"""The lines of the benchmark of steering: which rules, on which spans, with which goal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import attnbias as ab
from attnbias.steer import Rule

LAYERS, HEADS, KEY_HEADS, DIM, INNER, VOCABULARY = 4, 16, 4, 64, 2816, 1000
# Fixed before the code. Attention time in a prefill, time of the model for a decoded token.
GOALS = {"bias": 1.05, "reallocate": 1.3, "per head": 2.3, "ACT": 3.2, "branch": 2.1}
NO_GOAL = "no goal"


@dataclass(frozen=True, kw_only=True)
class Stretch(Rule):
    """A fifth of the attention on the span "document" goes to the rest: one contiguous group."""

    def groups(self, site: Any) -> Tensor:
        return site.where(("document",)).long()[:, None]  # type: ignore[no-any-return]

    def reallocate(self, site: Any, masses: Tensor) -> Tensor | None:
        return _moved(masses)


@dataclass(frozen=True, kw_only=True)
class Scattered(Rule):
    """The same with every 61st key: one group, shared by the heads."""

    def groups(self, site: Any) -> Tensor:
        return (site.key_positions % 61 == 3).long()[:, None]  # type: ignore[no-any-return]

    def reallocate(self, site: Any, masses: Tensor) -> Tensor | None:
        return _moved(masses)


@dataclass(frozen=True, kw_only=True)
class PerHead(Rule):
    """The same with other keys for each head."""

    def groups(self, site: Any) -> Tensor:
        heads = torch.tensor(site.heads)[None, :, None]
        return ((site.key_positions[:, None] + heads) % 61 == 3).long()  # type: ignore[no-any-return]

    def reallocate(self, site: Any, masses: Tensor) -> Tensor | None:
        return _moved(masses)


def _moved(masses: Tensor) -> Tensor | None:
    if masses.shape[-1] < 2:
        return None
    rest, some = masses.unbind(-1)
    new = torch.stack([rest + some / 5, some * 4 / 5], -1)
    return torch.where((masses > 0).all(-1, keepdim=True), new, masses)


@dataclass(frozen=True, kw_only=True)
class Doubled(Rule):
    """The branch alone: next-token scores plus those without the document, halved."""

    heads: Any = "all"
    row_local: ClassVar[bool] = True

    @property
    def branches(self) -> dict[str, Any]:
        from attnbias.steer.branch import Branch

        return {"without": Branch(without=("document",))}

    def logits(self, step: Any) -> Tensor:
        return (step.logits + step.branch("without").logits) / 2  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Line:
    """One line: its name, the goal it is under (a key of `GOALS`), the rules it makes.

    Args:
        prices: the rule whose page shows this line as its price, where it is one of the library's.
    """

    name: str
    goal: str
    make: Callable[[], Rule]
    prices: str = ""


def spans(length: int) -> dict[str, tuple[int, int | None]]:
    """Where things stand in a prompt: a document from a quarter to a half, an image before it."""
    quarter = length // 4
    parts = {
        "system": (0, quarter // 2),
        "image": (quarter // 2, quarter),
        "document": (quarter, 2 * quarter),
        "document 0": (quarter, 2 * quarter),
        "document 1": (2 * quarter, 3 * quarter),
        "context": (quarter, 2 * quarter),
        "question": (length - quarter // 2, length),
        "video": (quarter, 2 * quarter),
    }
    return {**parts, "generated": (length, None)}


def _residual() -> dict[int, list[float]]:
    gen = torch.Generator().manual_seed(1)
    return {n: torch.randn(HEADS * DIM, generator=gen).tolist() for n in range(LAYERS)}


R = ab.rules
SOME = tuple(range(0, HEADS, 2))
LINES: tuple[Line, ...] = (
    Line(
        "KeyShift", "bias", lambda: R.KeyShift(keys="document", amount=1.0, heads="all"),
        "KeyShift",
    ),
    Line(
        "KeyShift, half of the heads",
        "bias",
        lambda: R.KeyShift(keys="document", amount=1.0, heads=SOME),
    ),
    Line("ZeroTuning", "bias", lambda: R.ZeroTuning(factor=0.6, heads="all"), "ZeroTuning"),
    Line("PASTA", "bias", lambda: R.PASTA(keys="document", heads="all"), "PASTA"),
    Line("LocoRE", "bias", lambda: R.LocoRE(heads="all"), "LocoRE"),
    Line(
        "StreamingLLM, window 512", NO_GOAL, lambda: R.StreamingLLM(recent=512, heads="all"),
        "StreamingLLM",
    ),
    Line(
        "HardPattern, two heads", NO_GOAL,
        lambda: R.HardPattern(keys="document", heads=(0, 5)), "HardPattern",
    ),
    Line("ALFAR, reallocation", "bias", lambda: R.ALFAR(fusion=False, heads="all")),
    Line("a contiguous group", "reallocate", lambda: Stretch(heads="all")),
    Line("a scattered group", "reallocate", lambda: Scattered(heads="all")),
    Line(
        "SplitSoftmax, prefill too",
        "reallocate",
        lambda: R.SplitSoftmax(power=0.7, phase="both", heads="all"),
        "SplitSoftmax",
    ),
    Line(
        "FoundInTheMiddle, ranked",
        "reallocate",
        lambda: R.FoundInTheMiddle(
            ranking=_ranking(), temperature=0.1, layers=range(LAYERS), heads="all"
        ),
        "FoundInTheMiddle",
    ),
    Line("groups of each head", "per head", lambda: PerHead(heads="all")),
    Line(
        "VAR, 7 % of the tokens sinks",
        "per head",
        lambda: R.VAR(dims=(0,), tau=1.8, summ=0.0, rho=1.0, start=0, heads="all"),
        "VAR",
    ),
    Line("ACT, alpha 5", "ACT", lambda: R.ACT(alpha=5.0, heads="all"), "ACT"),
    Line("a branch without the document", "branch", lambda: Doubled()),
    Line("ALFAR", "branch", lambda: R.ALFAR(heads="all"), "ALFAR"),
    Line("VHR", "branch", lambda: R.VHR(), "VHR"),
    Line("DeCoRe, half of the heads", "branch", lambda: R.DeCoRe(heads=SOME), "DeCoRe"),
    Line(
        "PersonaVector", NO_GOAL, lambda: R.PersonaVector(directions=_residual()), "PersonaVector"
    ),
)  # fmt: skip


def _ranking() -> Any:
    names = ("document 0", "document 1")
    return R.Ranking(
        documents=names, sizes=(1, 1), attention=(0.2, 0.1), bias=(0.1, 0.1), depth=LAYERS
    )


def model() -> Any:
    """A Llama-type model with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * DIM,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        intermediate_size=INNER,
        max_position_embeddings=16384,
    )
    return LlamaForCausalLM(config).eval()
