"""The context manager: what it changes (nothing), runs, spans, labels, what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import attnbias as ab
from attnbias.errors import AttnbiasError, Refused
from attnbias.hub import Call, attach
from tests.cases.statistic import TARGETS, close, every
from tests.observe import models

s = ab.statistics


@pytest.fixture
def model(stories: Path) -> nn.Module:
    return models.stories_model(stories)


def ids(batch: int = 1, n: int = 24) -> torch.Tensor:
    return models.tokens(batch, n, 500)


def greedy(model: Any, given: torch.Tensor, new: int, **options: Any) -> torch.Tensor:
    return model.generate(  # type: ignore[no-any-return]
        input_ids=given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        **options,
    )


# The model is left alone --------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.SCENARIOS)
def test_output_is_unchanged_to_the_last_bit(name: str, request: pytest.FixtureRequest) -> None:
    scenario = models.scenario(name, request)
    with torch.no_grad():
        want = scenario.run(scenario.model)
        with ab.observe(scenario.model, every(), spans=scenario.spans, targets=TARGETS):
            got = scenario.run(scenario.model)
        after = scenario.run(scenario.model)
    for a, b, c in zip(want, got, after, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_generated_tokens_are_unchanged(model: nn.Module) -> None:
    want = greedy(model, ids(2), 6)
    with ab.observe(model, every(), spans=models.SPANS | {"middle": (3, 9)}, targets=TARGETS):
        got = greedy(model, ids(2), 6)
    assert torch.equal(want, got)


def test_gradients_pass_and_are_the_same(model: nn.Module) -> None:
    def grads(one: nn.Module) -> list[torch.Tensor]:
        one.zero_grad()
        one(input_ids=ids()).logits.square().mean().backward()
        return [p.grad.clone() for p in one.parameters() if p.grad is not None]

    one = copy.deepcopy(model)
    want = grads(one)
    with ab.observe(one, [s.Entropy(), s.Received()]) as seen:
        got = grads(one)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert not seen.tensor("entropy").values.requires_grad


def test_checkpointing_is_seen_once(model: nn.Module) -> None:
    one = copy.deepcopy(model).train()
    one.gradient_checkpointing_enable()  # type: ignore[operator]
    with ab.observe(one, [s.Received()]) as seen:
        one(input_ids=ids(), use_cache=False).logits.sum().backward()
    assert seen.runs == 1
    received = seen.tensor("received").values
    close(received.sum(-1), torch.full(received.shape[:-1], 24.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_counted_in_float32_or_better(
    model: nn.Module, dtype: torch.dtype
) -> None:
    one = copy.deepcopy(model).to(dtype)
    kept: list[tuple[torch.Tensor, torch.Tensor, float]] = []

    class Spy:
        role = "see"

        def begin_forward(self, forward: int) -> None: ...

        def end_forward(self, forward: int) -> None: ...

        def see(self, call: Call, *_: Any) -> None:
            kept.append((call.query.double(), call.key.double(), call.scale))

    with torch.no_grad(), ab.observe(one, [s.Entropy(), s.Received()]) as seen:  # noqa: SIM117
        with attach(one, Spy()):
            one(input_ids=ids(1, 32))
    for layer, (query, key, scale) in enumerate(kept):
        scores = scale * query @ key.repeat_interleave(2, 1).mT
        p = scores.masked_fill(~models.causal(32), -torch.inf).softmax(-1)
        tolerance = 1e-9 if dtype == torch.float64 else 1e-5
        close(seen.tensor("received").values[0, layer], p.sum(-2), tolerance)
        close(seen.tensor("entropy").values[0, layer], -torch.xlogy(p, p).sum(-1), tolerance)


def test_autocast_does_not_reach_the_statistics(model: nn.Module) -> None:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        with ab.observe(model, [s.Received()]) as seen:
            model(input_ids=ids())
        received = seen.tensor("received").values
    close(received.sum(-1), torch.full(received.shape[:-1], 24.0), 1e-5)


# Runs ---------------------------------------------------------------------------------------------


def test_each_prefill_is_a_run_and_steps_continue_it(model: nn.Module) -> None:
    with ab.observe(model, [s.Received(), s.Entropy(), s.SinkRate()]) as seen:
        greedy(model, ids(2, 20), 5)
        greedy(model, ids(1, 9), 3)
    assert seen.runs == 2
    received, entropy = seen.tensor("received"), seen.tensor("entropy")
    assert received.axes == ("run", "layer", "batch", "head", "key")
    assert entropy.axes == ("run", "layer", "batch", "head", "query")
    assert seen.tensor("sink_rate").axes == ("run", "layer", "batch", "head")
    assert received.shape == entropy.shape == (2, 5, 2, 8, 24)  # the last token is never fed
    assert received.labels["key"] == list(range(24))
    # The second run has one row and 11 positions.
    assert not received.values[1, :, 0, :, :11].isnan().any()
    assert received.values[1, :, 1].isnan().all()
    assert received.values[1, ..., 11:].isnan().all()
    sums = received.values.nansum(-1)
    close(sums[0], torch.full_like(sums[0], 24.0))
    first, second, both = seen.table(0), seen.table(1), seen.table()
    at = {"statistic": "entropy", "layer": 2, "head": 3}
    a, b, ab_ = (t.where(**at)[0].value for t in (first, second, both))
    assert ab_ == pytest.approx((48 * a + 11 * b) / 59, rel=1e-5)
    assert len(first) == len(both) == 5 * 8 * 3
    with pytest.raises(AttnbiasError, match="run must be between 0 and 1, got 2"):
        seen.table(2)


def test_the_open_span_grows_with_the_generation(model: nn.Module) -> None:
    with ab.observe(model, [s.Share()], spans={"prompt": (0, 20), "generated": (20, None)}) as seen:
        greedy(model, ids(1, 20), 6)
    share = seen.tensor("share").select(run=0, batch=0)
    assert share.axes == ("layer", "head", "query", "span")
    assert share.labels["span"] == ["prompt", "generated"]
    close(share.values.sum(-1), torch.ones(share.shape[:-1]))
    new = share.select(span="generated").values
    assert float(new[..., :20].abs().max()) == 0
    assert float(new[..., 20:].min()) > 0


def test_spans_of_a_prompt(model: nn.Module, stories: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories)
    prompt = ab.prompt(tokenizer, "What did Tim do?", documents=["Tim ran.", "The dog sat."])
    with torch.no_grad(), ab.observe(model, [s.Share()], spans=prompt.spans) as seen:
        model(**prompt.inputs)
    names = seen.tensor("share").labels["span"]
    assert {"first", "document 0", "document 1", "question", "generated"} <= set(names)
    assert {r.statistic for r in seen.table()} == {f"share[{n}]" for n in names}


def test_beam_search_is_refused(model: nn.Module) -> None:
    with (
        ab.observe(model, [s.Received()]),
        pytest.raises(Refused, match=r"changed places between two steps .beam search.*num_beams=1"),
    ):
        greedy(model, ids(2, 20), 12, num_beams=3)
    greedy(model, ids(1, 20), 2)  # and the model is its own again


def test_a_step_back_is_refused(model: nn.Module) -> None:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.no_grad(), ab.observe(model, [s.Entropy()]):
        model(input_ids=ids(), past_key_values=cache)
        cache.crop(-4)
        with pytest.raises(Refused, match=r"row 0 goes on at token 20 after token 23.*steps back"):
            model(input_ids=ids(1, 3), past_key_values=cache)


def test_a_cache_filled_before_is_refused(model: nn.Module) -> None:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids(), past_key_values=cache)
        with (
            ab.observe(model, [s.Entropy()]),
            pytest.raises(Refused, match=r"filled before observe.*run the prefill inside"),
        ):
            model(input_ids=ids(1, 1), past_key_values=cache)


def test_another_batch_size_within_a_generation_is_refused(model: nn.Module) -> None:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.no_grad(), ab.observe(model, [s.Entropy()]):
        model(input_ids=ids(), past_key_values=cache)
        cache.batch_repeat_interleave(2)
        with pytest.raises(Refused, match="went from 1 to 2 rows"):
            model(input_ids=ids(2, 1), past_key_values=cache)


def test_an_encoder_decoder_generates() -> None:
    from transformers import BartForConditionalGeneration

    torch.manual_seed(0)
    config = copy.deepcopy(models.bart_model().config)
    one = BartForConditionalGeneration(config).eval()
    given = models.tokens(2, 20)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 1, "do_sample": False}
    want = one.generate(input_ids=given, **options)
    with ab.observe(one, [s.Received(), s.Entropy()]) as seen:
        got = one.generate(input_ids=given, **options)
    assert torch.equal(want, got)
    assert seen.runs == 1
    cross = seen.tensor("received", tower="cross").values
    steps = seen.tensor("entropy", tower="cross").shape[-1]
    close(cross.sum(-1), torch.full(cross.shape[:-1], float(steps)))
    assert seen.tensor("entropy", tower="decoder").shape[-1] == steps


# Together with an editor --------------------------------------------------------------------------


@pytest.mark.parametrize("heads", ["all", [0, 5]], ids=["all heads", "two heads"])
def test_sees_the_attention_that_a_steer_context_makes(model: nn.Module, heads: Any) -> None:
    """Both ways of nesting; the edited map by another route: the eager map, tilted."""
    rule = ab.rules.KeyShift(keys="first", amount=1.5, heads=heads, layers=[0])
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")  # type: ignore[operator]
    given = {"input_ids": ids(1, 32)}
    with torch.no_grad():
        p = twin(**given, output_attentions=True).attentions[0].double()
        tilt = torch.zeros(32, dtype=torch.float64)
        tilt[0] = 1.5
        tilted = p * tilt.exp()
        edited = p.clone()
        chosen = range(8) if heads == "all" else heads
        for head in chosen:
            edited[:, head] = tilted[:, head] / tilted[:, head].sum(-1, keepdim=True)
        asked = [s.FirstToken(), s.Received(), s.Entropy()]
        with ab.steer(model, rule), ab.observe(model, asked) as inner:
            model(**given)
        with ab.observe(model, asked) as outer, ab.steer(model, rule):
            model(**given)
    assert float((edited - p).abs().max()) > 0.1
    for seen in (inner, outer):
        close(seen.tensor("first_token").values[0, 0], edited[..., 0])
        close(seen.tensor("received").values[0, 0], edited.sum(-2))
        close(seen.tensor("entropy").values[0, 0], -torch.xlogy(edited, edited).sum(-1))


def test_two_observers_see_the_same(model: nn.Module) -> None:
    with (
        torch.no_grad(),
        ab.observe(model, [s.Entropy()]) as outer,
        ab.observe(model, [s.Entropy()], layers=[2]) as inner,
    ):
        model(input_ids=ids())
    want = outer.tensor("entropy").values[:, 2:3]
    assert torch.equal(inner.tensor("entropy").values, want)


def test_two_towers_are_kept_apart() -> None:
    one = models.clip_model()
    pixels = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    given = {"input_ids": models.tokens(2, 20), "pixel_values": pixels}
    with torch.no_grad(), ab.observe(one, [s.Received(), s.Distance()]) as seen:
        one(**given)
    with pytest.raises(AttnbiasError, match=r"tower must be one of .*, got None"):
        seen.tensor("received")
    twin = copy.deepcopy(one)
    twin.set_attn_implementation("eager")  # type: ignore[operator]
    with torch.no_grad():
        out = twin(**given, output_attentions=True)
    for tower, maps in (
        ("text", out.text_model_output.attentions),
        ("vision", out.vision_model_output.attentions),
    ):
        got = seen.tensor("received", tower=tower).values[0]
        close(got, torch.stack([p.double().sum(-2) for p in maps]))
        assert {r.layer for r in seen.table().where(tower=tower)} == {0, 1}


# Choosing -----------------------------------------------------------------------------------------


def test_layers_are_chosen_and_named(model: nn.Module) -> None:
    with torch.no_grad():
        for layers in ([1, 3], {"text": (1, 3)}):
            with ab.observe(model, [s.Entropy()], layers=layers) as seen:
                model(input_ids=ids())
            assert seen.tensor("entropy").labels["layer"] == [1, 3]
            assert {r.layer for r in seen.table()} == {1, 3}
    for layers, words in (
        ([7], "no layer 7; there is text 0 to 4"),
        ({"vision": [0]}, "no layer 0 of tower 'vision'"),
        ([], "layers is empty"),
        ("first", "layers must be"),
        (3, "layers must be"),
        ([True], "no layer True"),
    ):
        with (
            pytest.raises(AttnbiasError, match=words),
            ab.observe(model, [s.Entropy()], layers=layers),
        ):
            pass


@pytest.mark.parametrize(
    ("statistics", "words"),
    [
        ([], "statistics is empty"),
        ([3], "such as statistics.Received.*got 3"),
        (3, "must be a list of statistics, got int"),
        (["recieved"], "no statistic is called 'recieved'; there are received, entropy"),
        ([s.Entropy(), "entropy"], "entropy 2 times"),
        ([s.Share()], "Share needs the spans it is to report.*given none"),
        ([s.Share(("b",))], "Share needs the spans b"),
    ],
)
def test_bad_statistics_change_nothing(model: nn.Module, statistics: Any, words: str) -> None:
    before = model.config._attn_implementation
    with pytest.raises(AttnbiasError, match=words), ab.observe(model, statistics):
        pass
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    "span",
    [(3, 3), (-1, 2), (5, 2), 4, "ab", (1, 2, 3), (0.5, 2), (True, 2), [(0, 1), (2, 2)], [1, 2, 3]],
)
def test_bad_spans_change_nothing(model: nn.Module, span: Any) -> None:
    with (
        pytest.raises(AttnbiasError, match=r"spans\['a'\] must be \(start, stop\)"),
        ab.observe(model, [s.Share()], spans={"a": span}),
    ):
        pass
    with (
        pytest.raises(AttnbiasError, match="name of a span must be a word, got 3"),
        ab.observe(model, [s.Share()], spans={3: (0, 1)}),  # type: ignore[dict-item]
    ):
        pass


def test_spans_by_row_must_fit_the_batch(model: nn.Module) -> None:
    with (
        torch.no_grad(),
        ab.observe(model, [s.Share()], spans={"a": [(0, 1), (2, 3)]}),
        pytest.raises(AttnbiasError, match=r"spans\['a'\] has 2 rows and the batch has 1"),
    ):
        model(input_ids=ids())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: s.Received("mean"), "one of sum, queries, visible, got 'mean'"),
        (lambda: s.SinkRate(threshold=1.5), "between 0 and 1, got 1.5"),
        (lambda: s.SinkRate(threshold=float("nan")), "between 0 and 1"),
        (lambda: s.SinkRate(threshold="0.3"), "between 0 and 1, got '0.3'"),
        (lambda: s.SinkRate(token=-1), "position of 0 or more, got -1"),
        (lambda: s.Share("first"), "tuple of span names, got 'first'"),
        (lambda: s.Share(()), "tuple of span names"),
    ],
)
def test_bad_parameters(make: Any, words: str) -> None:
    with pytest.raises(AttnbiasError, match=words):
        make()


def test_names_classes_and_labels(model: nn.Module) -> None:
    asked = ["received", s.FirstToken, s.Received("visible"), s.SinkRate(0.5, 2), "Entropy"]
    with torch.no_grad(), ab.observe(model, asked) as seen:
        assert seen.table() == []
        with pytest.raises(AttnbiasError, match="nothing was seen yet"):
            seen.tensor("entropy")
        model(input_ids=ids())
    labels = ["received", "first_token", "received[visible]", "sink_rate[0.5, 2]", "entropy"]
    assert list(dict.fromkeys(r.statistic for r in seen.table())) == labels
    assert seen.tensor("received[visible]").name == "received[visible]"
    assert seen.tensor("sink_rate").name == "sink_rate[0.5, 2]"
    with pytest.raises(AttnbiasError, match="'distance' is none of the statistics observed"):
        seen.tensor("distance")
    with pytest.raises(AttnbiasError, match="tower must be one of text, got 'vision'"):
        seen.tensor("received", tower="vision")
    with pytest.raises(AttnbiasError, match="has no layer 9"):
        seen.tensor("received").select(layer=9)


def test_an_exception_in_the_model_leaves_what_was_seen(model: nn.Module) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("planted")

    handle = model.model.layers[2].register_forward_pre_hook(fail)  # type: ignore[union-attr,index]
    with torch.no_grad(), ab.observe(model, [s.Entropy()]) as seen:
        with pytest.raises(RuntimeError, match="planted"):
            model(input_ids=ids())
        handle.remove()
        model(input_ids=ids())
    assert len(seen.table(0)) == 5 * 8
    assert seen.runs == 2
    assert seen.tensor("entropy").values[1, 3].isnan().all()


# The table ----------------------------------------------------------------------------------------


def test_the_table_is_the_mean_over_all_real_queries(request: pytest.FixtureRequest) -> None:
    scenario = models.scenario("stories, left padding", request)
    seen = scenario.observe(every(), scenario.spans, targets=TARGETS)
    for layer, whole in enumerate(scenario.maps()["text"]):
        p = whole.p.nan_to_num(0.0)
        rows, columns = torch.arange(40)[:, None], torch.arange(40)[None]
        means = {
            "entropy": -torch.xlogy(p, p).sum(-1),
            "first_token": p[..., 0],
            "distance": (p * (rows - columns).abs()).sum(-1),
            "share[first]": p[..., :3].sum(-1),
        }
        for name, values in means.items():
            want = values.masked_fill(~whole.real, torch.nan).movedim(1, 0).flatten(1).nanmean(1)
            got = [r.value for r in seen.table().where(statistic=name, layer=layer)]
            close(torch.tensor(got), want)
        received = p.sum(-2)
        top = received.argmax(-1, keepdim=True)
        seen_by = whole.visible.sum(-2).gather(-1, top)[..., 0]
        for name, over in (
            ("received", torch.ones(2, 8)),
            ("received[queries]", whole.real.sum(-1)),
            ("received[visible]", seen_by),
        ):
            want = (received.amax(-1) / over).mean(0)
            got = [r.value for r in seen.table().where(statistic=name, layer=layer)]
            close(torch.tensor(got), want)
