"""What a report says of real models equals what their stock eager maps say."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from attnbias import AttnbiasError
from attnbias.cli.loading import load
from attnbias.report import summarise
from attnbias.report.collect import collect
from attnbias.report.text import read, shuffled

TEXT = "Once upon a time there was a little girl who found an unbelievably large ball in the park."


@pytest.fixture(scope="module", params=["encoder", "decoder"])
def loaded(request):
    folder = request.getfixturevalue({"encoder": "minilm", "decoder": "stories"}[request.param])
    model, tokenizer, revision = load(str(folder))
    data = collect(model, tokenizer, TEXT, name="m", revision=revision, seed=7)
    return request.param, model, tokenizer, data


def maps_of(model, ids):
    """(layers, heads, queries, keys) from the stock eager model, in float64."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        given = eager(torch.tensor([ids]), output_attentions=True).attentions
    return torch.stack([one[0] for one in given]).double()


def even_of(maps, causal):
    queries = maps.shape[2]
    seen = torch.ones(queries, queries, dtype=torch.float64)
    seen = seen.tril() if causal else seen
    return seen / seen.sum(-1, keepdim=True)


def expected(maps):
    queries = maps.shape[2]
    gap = (torch.arange(queries)[:, None] - torch.arange(queries)).abs()
    return {
        "first_token": maps[..., 0].mean(-1),
        "last_token": maps[..., -1].mean(-1),
        "received": maps.mean(-2).amax(-1),
        "sink_rate": (maps[..., 0].mean(-1) > 0.3).double(),
        "entropy": -(torch.xlogy(maps, maps)).sum(-1).mean(-1),
        "distance": (maps * gap).sum(-1).mean(-1),
    }


def test_maps_equal_the_eager_maps(loaded):
    kind, model, tokenizer, data = loaded
    text = read(TEXT, tokenizer, None)
    order = shuffled(text.words, 7)
    mixed = [text.ids[place] for place in order]
    assert data.causal == (kind == "decoder")
    for panel, ids in (("values", text.ids), ("shuffled", mixed)):
        wanted = expected(maps_of(model, ids))
        for one in data.maps:
            found = torch.tensor(getattr(one, panel), dtype=torch.float64)
            scale = max(1.0, float(wanted[one.statistic].abs().max()))
            assert torch.allclose(found, wanted[one.statistic], atol=1e-5 * scale), one.statistic
    own = data.map("first_token")
    assert own.values != own.shuffled


def test_even_values_equal_those_of_a_uniform_map(loaded):
    _, model, tokenizer, data = loaded
    maps = maps_of(model, read(TEXT, tokenizer, None).ids)
    uniform = even_of(maps, data.causal)
    assert data.causal == bool((maps.triu(1) == 0).all())
    wanted = expected(uniform[None])
    for one in data.maps:
        if one.statistic != "sink_rate":
            assert one.even == pytest.approx([float(wanted[one.statistic][0])] * len(one.even))


def test_words_add_up_what_their_tokens_receive(loaded):
    _, model, tokenizer, data = loaded
    text = read(TEXT, tokenizer, None)
    own = maps_of(model, text.ids)
    order = shuffled(text.words, 7)
    mixed = maps_of(model, [text.ids[place] for place in order])
    even = even_of(own, data.causal).sum(0)
    assert [w.text for w in data.words if not w.special] == TEXT.split()
    assert any(w.tokens[1] - w.tokens[0] > 1 for w in data.words)
    for word in data.words:
        here = list(range(*word.tokens))
        there = [order.index(place) for place in here]
        by_layer = own.sum(2)[..., here].sum(-1).mean(1) / even[here].sum()
        moved = mixed.sum(2)[..., there].sum(-1).mean(1) / even[there].sum()
        assert word.by_layer == pytest.approx(by_layer.tolist(), rel=1e-4)
        assert word.received == pytest.approx(float(by_layer.mean()), rel=1e-4)
        place = mixed.sum(2)[..., here].sum(-1).mean(1) / even[here].sum()
        assert word.in_place == pytest.approx(float(place.mean()), rel=1e-4)
        assert word.shuffled == pytest.approx(float(moved.mean()), rel=1e-4)
        assert word.share == pytest.approx(float(own[..., here].sum(-1).mean()), rel=1e-4)
    assert sum(word.share for word in data.words) == pytest.approx(1, abs=1e-4)


def test_the_model_is_left_as_it_was(loaded):
    _, model, tokenizer, data = loaded
    ids = torch.tensor([read(TEXT, tokenizer, None).ids])
    weights = [one.clone() for one in model.parameters()]
    state = torch.get_rng_state()
    with torch.no_grad():
        before = model(ids)[0]
        model.train()
        again = collect(model, tokenizer, TEXT, name="m", revision=data.revision, seed=7)
        assert model.training
        model.eval()
        assert torch.equal(model(ids)[0], before)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert again == data


def test_random_weights_are_untrained_and_repeat(loaded):
    _, model, tokenizer, data = loaded
    other = collect(model, tokenizer, TEXT, name="m", revision=data.revision, seed=8)
    entropy, fresh = data.map("entropy"), other.map("entropy")
    assert entropy.values == fresh.values
    assert entropy.random != fresh.random
    # Untrained heads attend almost evenly; trained ones do not.
    lowest = min(x for row in entropy.random for x in row)
    assert lowest > 0.9 * min(entropy.even)
    assert min(x for row in entropy.values for x in row) < 0.7 * min(entropy.even)


def test_layers_can_be_chosen(loaded):
    _, model, tokenizer, data = loaded
    part = collect(model, tokenizer, TEXT, name="m", layers=(1, 3), seed=7)
    assert part.layers == (("text", 1), ("text", 3))
    assert part.map("entropy").values == tuple(data.map("entropy").values[n] for n in (1, 3))
    with pytest.raises(AttnbiasError, match="99"):
        collect(model, tokenizer, TEXT, name="m", layers=(99,))


def test_a_planted_sink_shows_in_the_summary(minilm):
    """Scaling a head's queries towards token 0 must raise the number that the summary gives."""
    model, tokenizer, _ = load(str(minilm))
    plain = collect(model, tokenizer, TEXT, name="m")
    key = plain.map("first_token").values[0][4]
    attention = model.encoder.layer[0].attention.self
    width = model.config.hidden_size // model.config.num_attention_heads
    rows = slice(4 * width, 5 * width)
    ids = torch.tensor([read(TEXT, tokenizer, None).ids])
    with torch.no_grad():
        first = attention.key(model.embeddings(ids))[0, 0, rows]
        attention.query.weight[rows] = 0
        attention.query.bias[rows] = 40 * first / first.norm()
    planted = collect(model, tokenizer, TEXT, name="m")
    value = planted.map("first_token").values[0][4]
    assert value > 0.5 > key + 0.2
    finding = next(one for one in summarise(planted).findings if one.key == "first_token")
    assert finding.strong
    assert not math.isnan(value)


def test_windows_change_what_even_attention_is():
    from transformers import MistralConfig, MistralForCausalLM

    from attnbias.hub import attach, sites
    from attnbias.report.even import Watch

    config = MistralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=4,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    watch = Watch(set(sites(model)), lambda: None, measure=True)
    with torch.no_grad(), attach(model, watch):
        model(torch.arange(12)[None])
    row, col = torch.arange(12)[:, None], torch.arange(12)
    seen = ((col <= row) & (col > row - 4)).double()
    share = seen / seen.sum(-1, keepdim=True)
    for one in watch.found.values():
        assert torch.allclose(one.received, share.sum(0))
        assert one.distance == pytest.approx(float((share * (row - col).abs()).sum() / 12))
        assert one.entropy == pytest.approx(float(seen.sum(-1).log().mean()))
        assert one.causal


def test_a_tokenizer_of_another_model_is_refused(minilm, stories):
    model, _, _ = load(str(stories))
    _, tokenizer, _ = load(str(minilm))
    with pytest.raises(AttnbiasError, match="tokenizer"):
        collect(model, tokenizer, TEXT, name="m")
