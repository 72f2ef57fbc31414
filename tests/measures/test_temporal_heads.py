"""Temporal heads: edges beside a decoder whose every node reads a copy of the stream of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from attnbias.errors import AttnbiasError, Refused
from attnbias.measures import Measure, TemporalHeads
from attnbias.measures.edge_attribution import edges
from tests.cases.measure import Maps, MeasureCase
from tests.steer import models
from tests.steer.models import Subject

STEPS = 2


def pairs(subject: Subject, seed: int = 0) -> dict[str, Any]:
    """Two rows with two other tokens in the corrupted prompt."""
    ids = subject.inputs["input_ids"].roll(seed, 1).clone()
    base = 300 if subject.name == "stories" else 0  # its common tokens
    ids[:, 1:] += base
    other = ids.clone()
    other[:, [2, 11]] = (ids[:, [2, 11]] - base + 7) % 90 + 3 + base
    return {
        "clean": {"input_ids": ids},
        "corrupted": {"input_ids": other},
        "answer": torch.tensor([5, 9]) + base,
        "wrong": torch.tensor([6, 11]) + base,
    }


def plain(model: Any, embeds: Tensor, masks: Any) -> tuple[dict[str, Tensor], Any, Tensor]:
    """A Llama or Mistral by hand: what nodes write, the copies of the stream they read, logits."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    base, reads, writes = model.model, {}, {"input": embeds}
    length = embeds.shape[1]
    cos, sin = base.rotary_emb(embeds, torch.arange(length)[None])
    stream = embeds
    for n, layer in enumerate(base.layers):
        attention = layer.self_attn
        width, count = attention.head_dim, attention.config.num_attention_heads
        share = count // attention.config.num_key_value_heads
        added = 0
        for head in range(count):
            copies = {}
            for role, own in (("q", head), ("k", head // share), ("v", head // share)):
                copy = stream * 1
                copy.retain_grad()
                reads[f"a{n}.h{head}<{role}>"] = copy
                project = getattr(attention, f"{role}_proj").weight[own * width : (own + 1) * width]
                copies[role] = (layer.input_layernorm(copy) @ project.T)[:, None]
            query, key = apply_rotary_pos_emb(copies["q"], copies["k"], cos, sin)
            shown = (query @ key.mT * width**-0.5 + masks[n]).softmax(-1) @ copies["v"]
            out = attention.o_proj.weight[:, head * width : (head + 1) * width]
            writes[f"a{n}.h{head}"] = shown[:, 0] @ out.T
            added = added + writes[f"a{n}.h{head}"]
        stream = stream + added
        copy = stream * 1
        copy.retain_grad()
        reads[f"m{n}"] = copy
        writes[f"m{n}"] = layer.mlp(layer.post_attention_layernorm(copy))
        stream = stream + writes[f"m{n}"]
    copy = stream * 1
    copy.retain_grad()
    reads["logits"] = copy
    return writes, reads, model.lm_head(base.norm(copy))


def by_hand(subject: Subject, pair: Mapping[str, Any]) -> dict[tuple[str, str], Tensor]:
    model: Any = subject.eager().double()
    window = getattr(model.config, "sliding_window", None)
    at = torch.arange(pair["clean"]["input_ids"].shape[1])
    gap = at[:, None] - at
    hide = (gap < 0) | (gap >= (window or 10**6))
    masks = [torch.where(hide, -torch.inf, 0.0).double()] * len(model.model.layers)
    both = [model.model.embed_tokens(pair[part]["input_ids"]) for part in ("clean", "corrupted")]
    clean, corrupted = [e.detach().requires_grad_() for e in both]
    first, _, logits = plain(model, clean, masks)
    assert torch.allclose(logits, model(pair["clean"]["input_ids"]).logits, atol=1e-4)
    second, _, _ = plain(model, corrupted, masks)
    found: dict[tuple[str, str], Tensor] = {}
    order = list(first)  # as nodes write: input, heads, MLP, heads, ...
    for step in range(STEPS):
        embeds = (corrupted + step / STEPS * (clean - corrupted)).detach().requires_grad_()
        _, reads, logits = plain(model, embeds, masks)
        rows = torch.arange(2)
        (logits[rows, -1, pair["answer"]] - logits[rows, -1, pair["wrong"]]).sum().backward()
        for child, copy in reads.items():
            own = child.split("<")[0]
            until = len(order) if own == "logits" else order.index(own)
            if own.startswith("a"):  # the heads of one layer read before any of them writes
                until = min(order.index(n) for n in order if n.split(".")[0] == own.split(".")[0])
            for parent in order[:until]:
                change = (first[parent] - second[parent]).detach()
                part = (change * copy.grad).sum((1, 2)) / STEPS
                found[parent, child] = found.get((parent, child), torch.zeros(2)) + part
    return found


@pytest.mark.parametrize("name", ["stories", "mistral"])
def test_edges_are_those_of_the_split_stream(name: str, request: pytest.FixtureRequest) -> None:
    subject = models.make(name, request)
    pair = pairs(subject)
    want = by_hand(subject, pair)
    got = edges(subject.model, pair, steps=STEPS, tower="text")
    assert set(got) == set(want)
    size = max(float(score.abs().max()) for score in want.values())
    assert size > 1e-2
    for edge, score in want.items():
        assert torch.allclose(got[edge], score.detach().double(), atol=2e-4 * max(size, 1)), edge


class TestTemporalHeads(MeasureCase):
    subjects: ClassVar[tuple[str, ...]] = ("mistral",)

    def build(self, subject: Subject) -> TemporalHeads:
        return TemporalHeads(STEPS, 60, 1e-3, 0.5)

    def data(self, subject: Subject) -> list[Mapping[str, Any]]:
        return [
            {**pairs(subject, 0), "time": 1999},
            {**pairs(subject, 1), "time": 1999},
            {**pairs(subject, 2), "time": 2004},
            {**pairs(subject, 3), "time": None},
        ]

    def test_equals_the_dense_route(self, name: str, request: pytest.FixtureRequest) -> None:
        subject = models.make(name, request)
        got = self.measured(subject)
        assert torch.equal(got.samples, self.dense(subject, {}))
        assert 0 < int((got.samples > 0).sum()) < got.samples.numel()

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        shares: dict[Any, list[set[str]]] = {}
        for circuit in self.data(subject):
            scores = {e: float(s.mean()) for e, s in by_hand(subject, circuit).items()}
            kept = sorted(scores, key=lambda e: abs(scores[e]))[-60:]
            for _ in range(50):  # edges whose parent reads nothing, or whose child hands nothing on
                kept = [
                    (p, c)
                    for p, c in kept
                    if (p == "input" or any(x.split("<")[0] == p for _, x in kept))
                    and (c == "logits" or any(y == c.split("<")[0] for y, _ in kept))
                ]
            nodes = {n.split("<")[0] for e in kept if scores[e] >= 1e-3 for n in e}
            shares.setdefault(circuit["time"], []).append(nodes)
        found = torch.zeros(1, 3, 4, dtype=torch.float64)
        for layer in range(3):
            for head in range(4):
                node = f"a{layer}.h{head}"
                if not any(node in nodes for nodes in shares[None]):
                    found[0, layer, head] = max(
                        sum(node in nodes for nodes in group) / len(group)
                        for time, group in shares.items()
                        if time is not None
                    )
        return found

    def rows(self, subject: Subject, given: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        return [given]  # a circuit is made of all its rows


def test_padding_changes_nothing(stories: Any) -> None:
    subject = models.stories(stories)
    pair = pairs(subject)
    want = edges(subject.model, pair, steps=2, tower="text")
    for side in ((2, 0), (0, 2)):
        padded = dict(pair)
        for part in ("clean", "corrupted"):
            ids = pair[part]["input_ids"]
            padded[part] = {
                "input_ids": torch.nn.functional.pad(ids, side),
                "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), side),
            }
        got = edges(subject.model, padded, steps=2, tower="text")
        for edge, score in want.items():
            assert torch.allclose(got[edge], score, atol=1e-3), (edge, side)


def test_the_scores_of_all_that_is_read_by_the_logits_add_up(stories: Any) -> None:
    """Integrated gradients are complete where one node reads: with linear nodes in between."""
    subject = models.stories(stories)
    pair = pairs(subject)
    got = edges(subject.model, pair, steps=1, tower="text")
    parents = [parent for parent, child in got if child == "logits"]
    assert len(parents) == 1 + 5 * 9
    assert ("a0.h0", "a0.h1<q>") not in got
    assert ("m0", "a0.h1<q>") not in got
    assert ("a0.h0", "m0") in got
    assert ("m0", "a1.h0<v>") in got


def test_a_planted_temporal_head_is_found() -> None:
    """Head 0 reads what years are made of, head 1 what subjects are; both attend to all alike."""
    from experiments.temporal_heads import OBJECT, circuits, decoder

    model = decoder(0)
    attention = model.model.layers[0].self_attn
    size, width = 64, attention.head_dim
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        table = model.model.embed_tokens.weight
        table[:, size - 1] = 3  # of all tokens, so that norms hardly tell them apart
        table[1:5, :width] = torch.randn(4, width, generator=generator)
        table[5:OBJECT, width : 2 * width] = torch.randn(OBJECT - 5, width, generator=generator)
        for head in (0, 1):
            part = slice(head * width, (head + 1) * width)
            attention.v_proj.weight[part, part] = torch.eye(width)
            attention.o_proj.weight[8 + part.start : 8 + part.stop, part] = torch.eye(width)
        model.lm_head.weight[OBJECT:, 8 : 8 + 2 * width] = 20 * torch.randn(
            len(table) - OBJECT, 2 * width, generator=generator
        )
    scores = TemporalHeads(4, threshold=0.05).measure(model, circuits(0))
    members = scores.details["membership"].double()
    assert members[:, 0, 2:].sum() == members[:, 1].sum() == 0
    assert scores.details["temporal"] == ((0, 0),)
    assert members[-3:, 0, 1].sum() == 3  # facts without years go through the head of subjects


def test_cuts() -> None:
    scores = {
        ("input", "a0.h0<q>"): 1.0,
        ("a0.h0", "logits"): 2.0,
        ("a0.h1", "logits"): 3.0,  # nothing goes into it
        ("input", "a0.h2<v>"): -2.5,  # nothing comes out of it
        ("input", "m0"): -1.5,
        ("m0", "logits"): 0.5,
        ("input", "logits"): 0.4,
    }
    cut = TemporalHeads(1, 6, 0.1).cut(scores)
    assert set(cut) == {("input", "a0.h0<q>"), ("a0.h0", "logits"), ("m0", "logits")}


BAD: list[tuple[Mapping[str, Any], str]] = [
    ({"steps": 0}, "steps"),
    ({"edges": 0}, "edges"),
    ({"share": 0.0}, "share"),
    ({"threshold": float("nan")}, "threshold"),
]


@pytest.mark.parametrize(("given", "word"), BAD)
def test_bad_fields(given: Mapping[str, Any], word: str) -> None:
    with pytest.raises(AttnbiasError, match=word):
        TemporalHeads(**given)


def test_what_it_refuses() -> None:
    subject = models.mistral()
    measure: Measure = TemporalHeads(1)
    timed = {**pairs(subject), "time": 1999}
    with pytest.raises(AttnbiasError, match="some without"):
        measure.measure(subject.model, [timed])
    with pytest.raises(AttnbiasError, match="wrong is missing"):
        measure.measure(subject.model, [{k: v for k, v in timed.items() if k != "wrong"}])
    with pytest.raises(AttnbiasError, match="one a row"):
        measure.measure(subject.model, [{**timed, "answer": torch.tensor([1])}])
    with pytest.raises(Refused, match="one stream"):
        edges(models.gemma3().model, pairs(subject), steps=1, tower="text")
