"""PositionalHeads beside loops over the queries and keys of a float64 twin, rotated by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.errors import AttnbiasError
from attnbias.measures import Measure, PositionalHeads
from attnbias.measures.positional_heads import correlation
from tests.cases.measure import Maps, MeasureCase
from tests.steer import models
from tests.steer.models import Subject

COUNT = 12


def rotated(config: Any, x: Tensor) -> Tensor:
    """Rotary embedding of (heads, tokens, dim) in the half-split layout, from its definition."""
    size = x.shape[-1]
    theta = config.rope_parameters["rope_theta"]
    out = x.clone()
    for position in range(x.shape[1]):
        for i in range(size // 2):
            angle = torch.tensor(position * theta ** (-2 * i / size), dtype=torch.float64)
            a, b = x[:, position, i], x[:, position, i + size // 2]
            out[:, position, i] = a * angle.cos() - b * angle.sin()
            out[:, position, i + size // 2] = b * angle.cos() + a * angle.sin()
    return out


class TestPositionalHeads(MeasureCase):
    subjects = ("stories", "mistral", "llava")
    index = "argmax"
    by = "pearson"
    padding: str | None = None

    def build(self, subject: Subject) -> Measure:
        return PositionalHeads(count=COUNT, index=self.index, by=self.by)  # type: ignore[arg-type]

    def data(self, subject: Subject) -> list[Mapping[str, Any]]:
        given = dict(subject.inputs)
        mask = torch.ones_like(given["input_ids"])
        if self.padding == "left":
            mask[1, :4] = 0
        if self.padding == "right":
            mask[0, -4:] = 0
        return [{**given, "attention_mask": mask}]

    def rows(self, subject: Subject, given: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        return [{w: v[n : n + 1] for w, v in given.items()} for n in range(2)]

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        twin: Any = subject.eager().double()
        text = getattr(twin.model, "language_model", twin.model)
        config = twin.config.get_text_config()
        kept: dict[Any, Tensor] = {}
        for number, layer in enumerate(text.layers):
            for part in ("q_proj", "k_proj"):
                getattr(layer.self_attn, part).register_forward_hook(
                    lambda module, args, out, at=(number, part): kept.__setitem__(at, out[0])
                )
        (given,) = self.data(subject)
        found = []
        for row in range(2):
            keep = given["attention_mask"][row].bool()
            own = {"input_ids": given["input_ids"][row : row + 1, keep]}
            if "pixel_values" in given:
                own["pixel_values"] = given["pixel_values"][row : row + 1].double()
            with torch.no_grad():
                twin(**own)
            lines = []
            for number, layer in enumerate(text.layers):
                width = layer.self_attn.head_dim
                query, key = (
                    rotated(config, kept[number, part].unflatten(-1, (-1, width)).movedim(1, 0))
                    for part in ("q_proj", "k_proj")
                )
                share = len(query) // len(key)
                lines.append(
                    [
                        self.head(query[h], key[h // share], getattr(config, "sliding_window", 0))
                        for h in range(len(query))
                    ]
                )
            found.append(torch.tensor(lines, dtype=torch.float64))
        return torch.stack(found)

    def head(self, query: Tensor, key: Tensor, window: int | None) -> float:
        half = query.shape[-1] // 2
        pairs = PositionalHeads(count=COUNT).draw(len(query))
        x, y = [], []
        for m, n in zip(*(p.tolist() for p in pairs), strict=True):
            if window and m - n >= window:
                continue
            product = query[m] * key[n]
            parts = product[:half] + product[half:]
            best = float(parts.argmax())
            if self.index == "expected":
                best = float((parts.softmax(-1) * torch.arange(half)).sum())
            x.append(best)
            y.append(float(m - n))
        both = torch.tensor([x, y], dtype=torch.float64)
        if self.by == "spearman":
            both = torch.stack([ranks(line) for line in both])
        return float(torch.corrcoef(both)[0, 1])


def ranks(x: Tensor) -> Tensor:
    return torch.stack([(x < v).sum() + ((x == v).sum() + 1) / 2 for v in x]).double()


class TestPositionalHeadsLeftPadded(TestPositionalHeads):
    subjects = ("stories",)
    index = "expected"
    padding = "left"


class TestPositionalHeadsRightPadded(TestPositionalHeads):
    subjects = ("stories",)
    by = "spearman"
    padding = "right"


def planted() -> Any:
    """A decoder of one layer with four heads; the second and fourth have one frequency each."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=8,
        bos_token_id=0,
        pad_token_id=None,
        eos_token_id=None,
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
    )
    model = LlamaForCausalLM(config).eval()
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.q_proj.weight.mul_(0.1)
        attention.k_proj.weight.mul_(0.1)
        # Head 1: the fast pair is strong near by, a slow one (at a right angle at distance zero)
        # takes over far off. Head 3 has the fast pair alone.
        for head, pair, strength in ((1, 0, 2.0), (3, 0, 2.0)):
            attention.q_proj.bias[8 * head + pair] = strength
            attention.k_proj.bias[8 * head + pair] = strength
        attention.q_proj.bias[8 + 2], attention.k_proj.bias[8 + 2 + 4] = 3.0, 2.0
    return model


def test_the_head_whose_slow_pair_takes_over_is_found() -> None:
    """Its score at a distance D is 6 sin(D angle) on the slow pair, 4 cos(D) on the fast one."""
    model = planted()
    ids = torch.randint(1, 16, (2, 40), generator=torch.Generator().manual_seed(1))
    scores = PositionalHeads().measure(model, [{"input_ids": ids}])
    assert scores.top(1) == ((0, 1),)
    assert scores.of(0, 1) > 0.3 > max(scores.of(0, head) for head in (0, 2, 3)) + 0.1
    shares = scores.details["shares"]
    assert int(shares[0, 1].argmax()) == 2
    torch.testing.assert_close(shares.sum(-1), torch.ones(1, 4).double())
    angles = scores.details["angles"][0]
    want = torch.tensor([1000.0 ** (-i / 4) for i in range(4)]).double()
    torch.testing.assert_close(angles, want, atol=1e-6, rtol=1e-5)


def test_without_the_slow_pair_the_head_no_longer_looks_far() -> None:
    model = planted()
    ids = torch.randint(1, 16, (1, 40), generator=torch.Generator().manual_seed(1))
    far = []
    for strength in (3.0, 0.0):
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.bias[8 + 2] = strength
            with ab.observe(model, ["distance"]) as seen:
                model(ids)
        far.append(float(seen.tensor("distance").values[0, 0, 0, 1, -1]))
    assert far[0] > 1.2 * far[1]


def test_parts_add_up_to_the_score() -> None:
    from attnbias.measures.positional_heads import Pairs, parts_of

    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 9, 8, generator=generator)
    pairs = Pairs(torch.tensor([[0, 4], [1, 5], [2, 6], [3, 7]]), torch.ones(4))
    torch.testing.assert_close(parts_of(query, key, pairs).sum(-1), (query * key).sum(-1))


@pytest.mark.parametrize("kind", ["gptj", "gpt_neox"])
def test_other_layouts(kind: str) -> None:
    """Neighbouring pairs, and rotation of a part of each head: found, or refused in a sentence."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, HeliumConfig, HeliumForCausalLM

    torch.manual_seed(0)
    small = {"vocab_size": 20, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 8}
    if kind == "gptj":  # neighbours turn together
        config = HeliumConfig(**small, num_hidden_layers=1, num_key_value_heads=2, head_dim=8)
        model: Any = HeliumForCausalLM(config).eval()
        members = [[0, 1], [2, 3], [4, 5], [6, 7]]
    else:
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**small, num_hidden_layers=1)).eval()
        members = [[0, 1]]  # a quarter of 8 dimensions
    found = []

    from attnbias.measures import positional_heads as module

    plain = module.parts_of

    def spy(query: Tensor, key: Tensor, pairs: Any) -> Tensor:
        found.append(pairs.members.tolist())
        return plain(query, key, pairs)

    module.parts_of = spy  # type: ignore[assignment]
    try:
        PositionalHeads(count=5).measure(model, [{"input_ids": torch.arange(1, 12)[None]}])
    finally:
        module.parts_of = plain
    assert found[0] == members


def test_models_without_rotation_are_refused(request: pytest.FixtureRequest) -> None:
    subject = models.make("minilm", request)
    with pytest.raises(ab.Refused, match="rotary"):
        PositionalHeads().measure(subject.model, [subject.inputs])
    for bad, word in (({"count": 0}, "count"), ({"index": "x"}, "index"), ({"by": "x"}, "by")):
        with pytest.raises(AttnbiasError, match=word):
            PositionalHeads(**bad)  # type: ignore[arg-type]


def test_correlation() -> None:
    x, y = torch.tensor([1.0, 2, 2, 5]).double(), torch.tensor([1.0, 3, 2, 9]).double()
    want = float(torch.corrcoef(torch.stack([x, y]))[0, 1])
    assert float(correlation(x, y, "pearson")) == pytest.approx(want)
    assert float(correlation(x.exp(), x, "spearman")) == pytest.approx(1.0)
    assert correlation(x * 0, y, "pearson").isnan()
