"""What a report says of real models equals what their stock eager maps say."""

from __future__ import annotations

import base64
import copy
import itertools
import json
import math
import random

import pytest
import torch

from attnbias import AttnbiasError
from attnbias.cli.loading import load
from attnbias.observe import statistics
from attnbias.report import summarise
from attnbias.report.collect import collect
from attnbias.report.files import to_json
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
    """Every known map; one that has no such token for a query leaves that query out."""
    queries = maps.shape[2]
    top = maps.amax(-1)
    gap = (torch.arange(queries)[:, None] - torch.arange(queries)).abs()
    return {
        "first_token": maps[..., 0].mean(-1),
        "last_token": maps[..., -1].mean(-1),
        "received": maps.mean(-2).amax(-1),
        "entropy": -(torch.xlogy(maps, maps)).sum(-1).mean(-1),
        "distance": (maps * gap).sum(-1).mean(-1),
        "previous_token": maps.diagonal(-1, -2, -1).mean(-1),
        "own_token": maps.diagonal(0, -2, -1).mean(-1),
        "next_token": maps.diagonal(1, -2, -1).mean(-1),
        "peak[weight]": top.mean(-1),
    }


def test_maps_equal_the_eager_maps(loaded):
    kind, model, tokenizer, data = loaded
    text = read(TEXT, tokenizer, None)
    order = shuffled(text.words, 7)
    mixed = [text.ids[place] for place in order]
    assert data.causal == (kind == "decoder")
    for panel, ids in (("values", text.ids), ("shuffled", mixed)):
        wanted = expected(maps_of(model, ids))
        assert set(wanted) <= {one.statistic for one in data.maps}
        for one in data.maps:
            if one.statistic not in wanted:
                continue
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
        if one.statistic in wanted:
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


def test_profiles_equal_the_eager_maps(loaded):
    _, model, tokenizer, data = loaded
    ids = read(TEXT, tokenizer, None).ids
    maps = maps_of(model, ids)
    length = len(ids)
    assert len(data.profiles) == maps.shape[0] * maps.shape[1]
    gap = torch.arange(length)[:, None] - torch.arange(length)
    uniform = even_of(maps, data.causal)
    for one in data.profiles:
        own = maps[one.layer, one.head]
        assert one.received == pytest.approx(own.mean(0).tolist(), abs=1e-5)
        near = [float(own[(gap >= low) & (gap <= high)].sum()) / length for low, high in data.gaps]
        assert one.near == pytest.approx(near, abs=2e-5)
        assert sum(one.near) == pytest.approx(1, abs=1e-4)
        value = own.mean(0).max()
        assert one.top[0][1] == pytest.approx(float(value), abs=1e-5)
        assert own.mean(0)[one.top[0][0]] == pytest.approx(float(value), abs=1e-6)
        levels = torch.frombuffer(bytearray(base64.b64decode(one.map)), dtype=torch.uint8)
        assert torch.allclose((levels / 255).square().view(length, -1), own.float(), atol=4e-3)
    assert data.gaps[0][0] == -(length - 1)
    assert data.gaps[-1][1] == length - 1
    covered = [n for low, high in data.gaps for n in range(low, high + 1)]
    assert covered == list(range(1 - length, length))
    for row in data.even_near:
        wanted = [float(uniform[(gap >= a) & (gap <= b)].sum()) / length for a, b in data.gaps]
        assert row == pytest.approx(wanted, abs=1e-6)
    assert data.even_received[0] == pytest.approx(uniform.mean(0).tolist(), abs=1e-6)


def test_distances_of_a_long_text_are_read_from_some_queries(loaded, monkeypatch):
    """With every block of queries among them the sample is the whole; with some it is near it."""
    from attnbias.report import profiles

    _, model, tokenizer, data = loaded
    monkeypatch.setattr(profiles, "WHOLE", 8)
    monkeypatch.setattr(profiles, "ROWS", 4)
    monkeypatch.setattr(profiles, "SAMPLED", 400)
    again = collect(model, tokenizer, TEXT, name="m", revision=data.revision, seed=7)
    for one, other in zip(data.profiles, again.profiles, strict=True):
        assert one.near == pytest.approx(other.near, abs=2e-5)
    monkeypatch.setattr(profiles, "SAMPLED", 12)
    part = collect(model, tokenizer, TEXT, name="m", revision=data.revision, seed=7)
    assert any(a.near != b.near for a, b in zip(data.profiles, part.profiles, strict=True))
    assert all(sum(one.near) == pytest.approx(1, abs=1e-4) for one in part.profiles)


def test_intervals_are_those_of_a_bootstrap_over_blocks(loaded):
    """Beside a plain loop with draws of its own; the interval holds the mean."""
    _, model, tokenizer, data = loaded
    own = maps_of(model, read(TEXT, tokenizer, None).ids)
    one = data.map("first_token")
    draw = random.Random(1)
    for layer, head in ((0, 0), (1, 3), (3, 5)):
        values = own[layer, head, :, 0].tolist()
        size, rest = divmod(len(values), data.blocks)
        ends = [n * size + min(n, rest) for n in range(data.blocks + 1)]
        parts = [values[a:b] for a, b in itertools.pairwise(ends)]
        means = sorted(
            sum(map(sum, chosen)) / sum(map(len, chosen))
            for chosen in ([draw.choice(parts) for _ in parts] for _ in range(4000))
        )
        low, high = one.low[layer][head], one.high[layer][head]
        spread = means[-100] - means[100]
        assert low == pytest.approx(means[100], abs=0.15 * spread)
        assert high == pytest.approx(means[-100], abs=0.15 * spread)
        assert low < one.values[layer][head] < high
    assert data.map("sink_rate").low == ()


def test_a_saved_report_comes_back(loaded):
    from attnbias.report import ReportData

    data = loaded[3]
    text = to_json(data).decode()
    again = ReportData.from_dict(json.loads(text))
    assert to_json(again).decode() == text
    assert again.profiles == data.profiles
    damaged = json.loads(text)
    for change in ({"text": "other"}, {"schema": "attnbias.report/1"}, {"words": [{}]}):
        with pytest.raises(AttnbiasError, match="saved report"):
            ReportData.from_dict({**damaged, **change})


def test_rules_are_in_force(loaded):
    from attnbias.steer import rules

    kind, model, tokenizer, data = loaded
    layer, head = (2, 1)
    rule = rules.BlockHeads(heads=((layer, head),), mode="uniform")
    moved = collect(model, tokenizer, TEXT, name="m", seed=7, rules=(rule,))
    one, two = data.map("entropy"), moved.map("entropy")
    assert two.values[layer][head] == pytest.approx(two.even[layer], abs=1e-4), kind
    assert one.values[layer][head] < two.values[layer][head] - 1e-3
    assert two.values[0] == pytest.approx(one.values[0], abs=1e-6)


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
    assert to_json(again) == to_json(data)  # nan is not equal to itself


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
    wanted = [statistics.Entropy(), statistics.Distance()]
    watch = Watch(set(sites(model)), lambda: None, wanted)
    with torch.no_grad(), attach(model, watch):
        model(torch.arange(12)[None])
    row, col = torch.arange(12)[:, None], torch.arange(12)
    seen = ((col <= row) & (col > row - 4)).double()
    share = seen / seen.sum(-1, keepdim=True)
    for one in watch.found.values():
        assert torch.allclose(one.received, share.sum(0))
        gap = float((share * (row - col).abs()).sum() / 12)
        assert one.values["distance"] == pytest.approx(gap)
        assert one.values["entropy"] == pytest.approx(float(seen.sum(-1).log().mean()))
        assert one.causal


def test_a_tokenizer_of_another_model_is_refused(minilm, stories):
    model, _, _ = load(str(stories))
    _, tokenizer, _ = load(str(minilm))
    with pytest.raises(AttnbiasError, match="tokenizer"):
        collect(model, tokenizer, TEXT, name="m")


def test_a_long_text_is_told_its_time_before(loaded, monkeypatch, capsys):
    _, model, tokenizer, data = loaded
    collect(model, tokenizer, TEXT, name="m", seed=7, progress=True)
    assert "controls of the same length" not in capsys.readouterr().err
    monkeypatch.setattr("attnbias.report.collect.LONG", len(data.tokens))
    collect(model, tokenizer, TEXT, name="m", seed=7, progress=True)
    said = capsys.readouterr().err
    assert f"{len(data.tokens)} tokens, and two controls of the same length: " in said
