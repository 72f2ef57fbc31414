"""Loops that a rule drives: plain driving is plain decoding, and going back works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.steer import Branch, Loop, Rule, SiteCall, Tokens
from tests.cases.rule import off, padded
from tests.steer.models import Subject, make

OPTIONS = {"max_new_tokens": 11, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
STATIC = {"cache_implementation": "static", "disable_compile": True}


@dataclass(frozen=True, kw_only=True)
class Drive(Rule):
    """Whatever a test wants done with the loop."""

    heads: str = "all"  # type: ignore[assignment]
    run: Callable[[Loop], None]

    def look(self, site: SiteCall) -> Tensor:
        return site.attention(site.last[:, None])

    def decode(self, loop: Loop) -> None:
        self.run(loop)


@dataclass(frozen=True, kw_only=True)
class Branching(Rule):
    """A rule with a branch."""

    heads: str = "all"  # type: ignore[assignment]

    @property
    def branches(self) -> dict[str, Branch]:
        return {"other": Branch(rules=(ab.rules.KeyShift(keys="first", amount=1.0, heads="all"),))}

    def logits(self, step: Any) -> Tensor:
        found: Tensor = step.logits + step.branch("other").logits
        return found


@dataclass(frozen=True, kw_only=True)
class Dropping(Rule):
    """A rule that drops tokens."""

    heads: str = "all"  # type: ignore[assignment]
    drops_tokens: ClassVar[bool] = True

    def tokens(self, site: Any, hidden: Tensor) -> Tokens | None:
        return Tokens(keep=site.positions != 3) if site.layer == 1 else None


def chunks(count: int = 1, tokens: int = 4, which: int = 0) -> Drive:
    def run(loop: Loop) -> None:
        while not loop.finished:
            loop.append(loop.candidates(count, tokens)[which])

    return Drive(run=run)


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Subject:
    """Two prompts of different lengths, padded on the left."""
    subject = make("stories", request)
    inputs, _, _ = padded(subject, "left")
    del inputs["position_ids"]
    subject.inputs = inputs
    return subject


def one(subject: Subject) -> Subject:
    subject.inputs = subject.row(0)
    return subject


@pytest.mark.parametrize(
    "options",
    [
        {},
        STATIC,
        {"prefill_chunk_size": 5},
        {"repetition_penalty": 1.7, "min_new_tokens": 9},
        {"num_return_sequences": 1, "max_length": 20, "max_new_tokens": None},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
@pytest.mark.parametrize(("count", "tokens"), [(1, 1), (1, 4), (3, 5)])
def test_greedy_driving_is_plain_decoding(
    subject: Subject, options: dict[str, Any], count: int, tokens: int
) -> None:
    plain = subject.model.generate(**subject.inputs, **{**OPTIONS, **options})
    with ab.steer(subject.model, chunks(count, tokens, count - 1)):
        found = subject.model.generate(**subject.inputs, **{**OPTIONS, **options})
    assert torch.equal(found, plain)


@pytest.mark.parametrize("name", ["mistral", "gpt_oss", "llava", "qwen2_vl", "gemma3"])
def test_every_decoder_can_be_driven(name: str, request: pytest.FixtureRequest) -> None:
    subject = one(make(name, request))
    towers = {} if subject.towers is None else {"towers": subject.towers}
    inputs = {**subject.inputs, "attention_mask": torch.ones_like(subject.inputs["input_ids"])}
    plain = subject.model.generate(**inputs, **OPTIONS)
    rule = Drive(run=chunks(3, 4, 2).run, **towers)
    with ab.steer(subject.model, rule):
        found = subject.model.generate(**inputs, **OPTIONS)
    assert torch.equal(found, plain)


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"top_k": 5, "top_p": 0.8}])
def test_sampling_takes_the_same_random_numbers(subject: Subject, options: dict[str, Any]) -> None:
    one(subject)
    given = {**OPTIONS, "do_sample": True, **options}
    found = []
    for context in (None, chunks(), chunks(4, 4), chunks(4, 4)):
        torch.manual_seed(5)
        if context is None:
            found.append(subject.model.generate(**subject.inputs, **given))
        else:
            with ab.steer(subject.model, context):
                found.append(subject.model.generate(**subject.inputs, **given))
    plain, single, first, second = found
    assert torch.equal(single, plain)
    assert torch.equal(first, second)
    torch.manual_seed(6)
    with ab.steer(subject.model, chunks()):
        other = subject.model.generate(**subject.inputs, **given)
    assert not torch.equal(other, plain)


@pytest.mark.parametrize("name", ["stories", "mistral", "qwen2_vl"])
@pytest.mark.parametrize("options", [{}, STATIC], ids=["dynamic", "static"])
def test_after_a_candidate_the_model_stands_where_its_tokens_say(
    name: str, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """Scores and looks after any mix of candidates and tokens are those of a fresh forward."""
    subject = one(make(name, request))
    towers = {} if subject.towers is None else {"towers": subject.towers}
    seen: list[tuple[Tensor, Tensor, dict[Any, Tensor]]] = []

    def run(loop: Loop) -> None:
        torch.manual_seed(3)
        mark = loop.snapshot()
        seen.append((loop.tokens, loop.logits, loop.looked))
        tries = loop.candidates(3, 4, sample=True)
        assert len({tuple(part.tokens.tolist()) for part in tries}) > 1
        for part in tries:
            loop.append(part)
            loop.append(torch.tensor([7, 9]))
            seen.append((loop.tokens, loop.logits, loop.looked))
            loop.rewind(mark)
        loop.append(tries[1])
        again = loop.candidates(2, 3, sample=True)[0]
        loop.append(again)
        seen.append((loop.tokens, loop.logits, loop.looked))
        loop.append(loop.candidates(1, 99)[0])

    with ab.steer(subject.model, Drive(run=run, **towers)):
        subject.model.generate(**subject.inputs, **OPTIONS, **options)
    assert len(seen) == 5
    for ids, logits, looked in seen:
        watch = Drive(run=run, **towers)
        inputs = {**subject.inputs, "input_ids": ids}
        if "mm_token_type_ids" in inputs:
            more = ids.shape[1] - inputs["mm_token_type_ids"].shape[1]
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(
                inputs["mm_token_type_ids"], (0, more)
            )
        with torch.no_grad(), ab.steer(subject.model, watch):
            wanted = subject.model(**inputs).logits[0, -1]
        assert off(logits, wanted) < 2e-5
        assert looked
        assert all(value.shape[0] == 1 for value in looked.values())


@pytest.mark.parametrize("name", ["stories", "mistral"])
def test_looks_of_candidates_are_those_of_one_pass(
    name: str, request: pytest.FixtureRequest
) -> None:
    subject = one(make(name, request))
    ids, steps = subject.inputs["input_ids"], []

    def run(loop: Loop) -> None:
        torch.manual_seed(3)
        for part in loop.candidates(3, 6, sample=True):
            steps.append((part.tokens, part.looked))
        loop.append(loop.candidates(1, 99)[0])

    with ab.steer(subject.model, Drive(run=run)):
        subject.model.generate(**subject.inputs, **OPTIONS)
    eager = subject.eager()
    for tokens, looked in steps:
        whole = torch.cat([ids, tokens[None]], 1)
        with torch.no_grad():
            maps = eager(input_ids=whole, output_attentions=True).attentions
        for number, step in enumerate(looked):
            row = ids.shape[1] - 1 + number
            for site, value in step.items():
                size = value.shape[-1]
                wanted = maps[site.layer][0, :, row, row + 1 - size : row + 1]
                assert torch.allclose(value[0, :, 0], wanted, atol=2e-5)


@pytest.mark.parametrize("name", ["stories", "mistral", "gpt_oss"])
@pytest.mark.parametrize("options", [{}, STATIC], ids=["dynamic", "static"])
def test_the_step_after_the_prompt_can_be_run_again(
    name: str, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """Also where a window has dropped what came before (the prompt is longer than it)."""
    subject = one(make(name, request))
    pairs: list[tuple[Tensor, Tensor]] = []

    def run(loop: Loop) -> None:
        before = loop.logits
        loop.again()
        pairs.append((loop.logits, before))
        while not loop.finished:
            loop.append(loop.candidates(1, 4)[0])

    plain = subject.model.generate(**subject.inputs, **OPTIONS)
    with ab.steer(subject.model, Drive(run=run)):
        found = subject.model.generate(**subject.inputs, **OPTIONS, **options)
    assert torch.equal(found, plain)
    assert len(pairs) == 1
    assert off(*pairs[0]) < 2e-5


def test_going_back_brings_the_same_random_numbers(subject: Subject) -> None:
    one(subject)
    found: list[list[int]] = []

    def run(loop: Loop) -> None:
        mark = loop.snapshot()
        for same in (False, True, False):
            found.append(loop.candidates(1, 6, sample=True)[0].tokens.tolist())
            loop.rewind(mark, random=same)
        found.append(loop.candidates(1, 6, sample=True)[0].tokens.tolist())
        loop.append(loop.candidates(1, 99)[0])

    with ab.steer(subject.model, Drive(run=run)):
        torch.manual_seed(1)
        subject.model.generate(**subject.inputs, **OPTIONS)
    assert found[1] != found[0]  # the numbers went on
    assert found[2] == found[0]  # those of the snapshot again
    assert found[3] != found[0]


def test_stopping_criteria_eos_and_padding(subject: Subject) -> None:
    """Rows stop where plain rows stop, and are filled up alike."""
    plain = subject.model.generate(**subject.inputs, **OPTIONS)
    stop = int(plain[0, -6])
    options = {**OPTIONS, "eos_token_id": stop}
    wanted = subject.model.generate(**subject.inputs, **options)
    for rule in (chunks(1, 1), chunks(1, 4), chunks(2, 50)):
        with ab.steer(subject.model, rule):
            assert torch.equal(subject.model.generate(**subject.inputs, **options), wanted)
    assert not torch.equal(wanted, plain)

    length = plain.shape[1] - 4

    def enough(ids: Tensor, scores: Any, **more: Any) -> Tensor:
        return torch.full((len(ids),), ids.shape[1] >= length)

    with ab.steer(subject.model, chunks(3, 5)):
        found = subject.model.generate(**subject.inputs, **OPTIONS, stopping_criteria=[enough])
    assert torch.equal(found, plain[:, :length])


def test_texts_to_stop_at(subject: Subject, stories: Any) -> None:
    from transformers import AutoTokenizer

    one(subject)
    tokenizer = AutoTokenizer.from_pretrained(stories)
    plain = subject.model.generate(**subject.inputs, **OPTIONS)
    more = {"stop_strings": [tokenizer.convert_ids_to_tokens(int(plain[0, -5])).strip("▁")]}
    more["tokenizer"] = tokenizer  # type: ignore[assignment]
    wanted = subject.model.generate(**subject.inputs, **OPTIONS, **more)
    with ab.steer(subject.model, chunks(1, 4)):
        found = subject.model.generate(**subject.inputs, **OPTIONS, **more)
    assert wanted.shape[1] < plain.shape[1]
    assert torch.equal(found, wanted)


class Stream:
    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.parts.append(value)

    def end(self) -> None:
        self.ended = True


def test_a_streamer_gets_what_is_accepted(subject: Subject) -> None:
    one(subject)
    streams = Stream(), Stream()
    plain = subject.model.generate(**subject.inputs, **OPTIONS, streamer=streams[0])

    def run(loop: Loop) -> None:
        while not loop.finished:
            loop.candidates(2, 3, sample=True)
            loop.append(loop.candidates(1, 3)[0])
        with pytest.raises(ab.AttnbiasError, match="finished"):
            loop.append(3)

    with ab.steer(subject.model, Drive(run=run)):
        subject.model.generate(**subject.inputs, **OPTIONS, streamer=streams[1])
    flat = [torch.cat([part.reshape(-1) for part in stream.parts]) for stream in streams]
    assert torch.equal(flat[1], flat[0])
    assert torch.equal(flat[1], plain[0])
    assert streams[1].ended


def test_taken_back_tokens_cannot_be_unstreamed(subject: Subject) -> None:
    one(subject)

    def run(loop: Loop) -> None:
        mark = loop.snapshot()
        loop.append(loop.candidates(1, 3)[0])
        loop.rewind(mark)

    with (
        ab.steer(subject.model, Drive(run=run)),
        pytest.raises(ab.AttnbiasError, match="streamed"),
    ):
        subject.model.generate(**subject.inputs, **OPTIONS, streamer=Stream())


def test_spans_per_row_and_rules_around(subject: Subject) -> None:
    """Each row sees its own spans while it is run, in every context, also when repeated."""
    spans = {"document": [(2, 5), (5, 8)]}
    shift = ab.rules.KeyShift(keys="document", amount=8.0, heads="all")
    options = {**OPTIONS, "do_sample": True, "num_return_sequences": 2, "top_k": 1}
    with ab.steer(subject.model, shift, spans=spans):
        wanted = subject.model.generate(**subject.inputs, **options)
        with ab.steer(subject.model, chunks(3, 4)):
            inside = subject.model.generate(**subject.inputs, **options)
    with ab.steer(subject.model, chunks(1, 4), shift, spans=spans):
        beside = subject.model.generate(**subject.inputs, **options)
    plain = subject.model.generate(**subject.inputs, **options)
    assert torch.equal(inside, wanted)
    assert torch.equal(beside, wanted)
    assert not torch.equal(wanted, plain)
    swapped = {"document": [(5, 8), (2, 5)]}
    with ab.steer(subject.model, chunks(1, 4), shift, spans=swapped):
        other = subject.model.generate(**subject.inputs, **options)
    assert not torch.equal(other, wanted)


def test_spans_that_fit_no_row_are_refused(subject: Subject) -> None:
    shift = ab.rules.KeyShift(keys="document", amount=4.0, heads=[0])
    spans = {"document": [(2, 5), (5, 8), (1, 2)]}
    with (
        pytest.raises(ab.AttnbiasError, match="given for 3 rows and the model runs 2"),
        ab.steer(subject.model, chunks(), shift, spans=spans),
    ):
        subject.model.generate(**subject.inputs, **OPTIONS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 2}, "beams: leave out num_beams=2"),
        ({"prompt_lookup_num_tokens": 3}, "assisted decoding: leave out prompt_lookup"),
        ({"guidance_scale": 2.0}, "second forward"),
        ({"penalty_alpha": 0.5, "top_k": 4}, "contrastive search"),
        ({"custom_generate": lambda *a, **k: None}, "decoding function of your own"),
        ({"use_cache": False}, "needs use_cache=True"),
        ({"prefix_allowed_tokens_fn": lambda row, ids: [3]}, "cannot honour prefix_allowed"),
        ({"return_dict_in_generate": True, "output_scores": True}, "needs no output_scores"),
        ({"stop_strings": ["a"]}, "tokenizer=tokenizer"),
        ({"streamer": Stream()}, "one row with a streamer"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    subject: Subject, options: dict[str, Any], words: str
) -> None:
    with (
        ab.steer(subject.model, chunks()),
        pytest.raises(ab.AttnbiasError, match=words) as caught,
    ):
        subject.model.generate(**subject.inputs, **{**OPTIONS, **options})
    assert "\n" not in str(caught.value)
    assert "generate" not in vars(subject.model)


def test_settings_of_a_config_are_seen(subject: Subject) -> None:
    import copy

    config = copy.deepcopy(subject.model.generation_config)
    config.num_beams = 3
    for given in ({"generation_config": config}, {}):
        if not given:
            subject.model.generation_config.num_beams = 3
        with (
            ab.steer(subject.model, chunks()),
            pytest.raises(ab.errors.Refused, match="num_beams=3"),
        ):
            subject.model.generate(**subject.inputs, **given)
    subject.model.generation_config.num_beams = 1
    with (
        ab.steer(subject.model, chunks()),
        pytest.raises(ab.errors.Refused, match="num_beams=3"),
    ):
        subject.model.generate(subject.inputs["input_ids"], config)


def test_rules_with_branches_refuse_beams(subject: Subject) -> None:
    with ab.steer(subject.model, Branching()):
        subject.model.generate(**subject.inputs, **OPTIONS)
        with pytest.raises(ab.errors.Refused, match=r"Branching needs.*beams"):
            subject.model.generate(**subject.inputs, **OPTIONS, num_beams=2)
    subject.model.generate(**subject.inputs, **OPTIONS, num_beams=2)


def test_only_one_rule_decides_how_to_decode(subject: Subject) -> None:
    for rules in ((chunks(), chunks()), (chunks(), Branching())):
        with (
            pytest.raises(ab.errors.Refused, match="both decide"),
            ab.steer(subject.model, *rules),
        ):
            pass
        for outer, inner in (rules, rules[::-1]):
            with (
                pytest.raises(ab.errors.Refused, match="both decide"),
                ab.steer(subject.model, outer),
                ab.steer(subject.model, inner),
            ):
                pass
    assert "generate" not in vars(subject.model)


def test_rules_that_drop_tokens_cannot_follow(subject: Subject) -> None:
    """Inside, outside or beside."""
    pairs = ((chunks(), Dropping()), (Dropping(), chunks()))
    for first, second in pairs:
        with (
            ab.steer(subject.model, first),
            ab.steer(subject.model, second),
            pytest.raises(ab.errors.Refused, match="Dropping cannot follow"),
        ):
            subject.model.generate(**subject.inputs, **OPTIONS)
        with (
            ab.steer(subject.model, first, second),
            pytest.raises(ab.errors.Refused, match="Dropping cannot follow"),
        ):
            subject.model.generate(**subject.inputs, **OPTIONS)


def test_models_that_cannot_be_driven(subject: Subject, request: pytest.FixtureRequest) -> None:
    for model, words in (
        (subject.model.model, "which LlamaModel does not have"),
        (make("bart decoder", request).model, "is an encoder-decoder"),
    ):
        rule = Drive(run=chunks().run, towers=("text",) if "Llama" in words else ("decoder",))
        with pytest.raises(ab.errors.Refused, match=words), ab.steer(model, rule):
            pass


def test_a_loop_must_be_finished(subject: Subject) -> None:
    rule = Drive(run=lambda loop: loop.append(loop.candidates(1, 2)[0]))
    with (
        ab.steer(subject.model, rule),
        pytest.raises(ab.AttnbiasError, match="before the text was finished"),
    ):
        subject.model.generate(**subject.inputs, **OPTIONS)


def test_after_an_exception_everything_is_as_it_was(subject: Subject) -> None:
    """The model, its spans, what the rule had noted, and a cache of the caller's."""
    from transformers import DynamicCache

    one(subject)
    model, ids = subject.model, subject.inputs["input_ids"]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :-3], past_key_values=cache)
    before = [layer.keys.clone() for layer in cache.layers]
    noted: list[Any] = []

    def fail(loop: Loop) -> None:
        loop.state["note"] = 1
        noted.append(loop.state)
        loop.append(loop.candidates(1, 3)[0])
        raise RuntimeError("in the middle")

    plain = model.generate(**subject.inputs, **OPTIONS)
    shift = ab.rules.KeyShift(keys="part", amount=3.0, heads="all")
    given = {"input_ids": ids, "past_key_values": cache}
    with ab.steer(model, Drive(run=fail), shift, spans={"part": [(0, 3)]}):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="in the middle"):
                model.generate(**given, **OPTIONS)
            assert noted[-1] == {}
    assert "generate" not in vars(model)
    for layer, keys in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
    assert torch.equal(model.generate(**subject.inputs, **OPTIONS), plain)
    with ab.steer(model, chunks(1, 4)):
        assert torch.equal(model.generate(**given, **OPTIONS), plain)
    assert cache.get_seq_length() == plain.shape[1] - 1  # and now it is used


def test_a_dictionary_is_returned_on_request(subject: Subject) -> None:
    plain = subject.model.generate(**subject.inputs, **OPTIONS)
    with ab.steer(subject.model, chunks(1, 4)):
        found = subject.model.generate(**subject.inputs, **OPTIONS, return_dict_in_generate=True)
    assert torch.equal(found.sequences, plain)


def test_packed_pixels_of_several_rows_are_refused(request: pytest.FixtureRequest) -> None:
    subject = make("qwen2_vl", request)
    rule = Drive(run=chunks().run, towers=subject.towers)
    with (
        ab.steer(subject.model, rule),
        pytest.raises(ab.errors.Refused, match=r"pixel_values.*one row"),
    ):
        subject.model.generate(**subject.inputs, **OPTIONS)


def test_pixels_of_several_rows_stay_with_their_row(request: pytest.FixtureRequest) -> None:
    subject = make("llava", request)
    plain = subject.model.generate(**subject.inputs, **OPTIONS)
    with ab.steer(subject.model, Drive(run=chunks(2, 4).run, towers=subject.towers)):
        found = subject.model.generate(**subject.inputs, **OPTIONS)
    assert torch.equal(found, plain)


def test_settings_of_rule_and_call_do_not_mix(subject: Subject) -> None:
    def run(loop: Loop) -> None:
        while not loop.finished:
            loop.append(loop.candidates(1, 4, sample=True, temperature=0.5, top_p=0.9)[0])

    with ab.steer(subject.model, Drive(run=run)):
        torch.manual_seed(0)
        found = subject.model.generate(**subject.row(0), **OPTIONS)
        with pytest.raises(ab.errors.Refused, match="leave out do_sample"):
            subject.model.generate(**subject.inputs, **{**OPTIONS, "do_sample": True})
    torch.manual_seed(0)
    options = {**OPTIONS, "do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 0}
    assert torch.equal(found, subject.model.generate(**subject.row(0), **options))


def test_gradients_of_one_step(subject: Subject) -> None:
    """The graph is that step alone, its scores are the plain ones, and decoding goes on."""
    one(subject)
    pairs: list[tuple[Tensor, Tensor]] = []

    def run(loop: Loop) -> None:
        while not loop.finished:
            plain = loop.logits if not pairs else None
            probe = loop.step_with_gradients()
            assert probe.logits.requires_grad
            assert not loop.logits.requires_grad
            assert torch.equal(loop.logits, probe.logits.detach())
            if plain is not None:
                assert off(loop.logits, plain) < 2e-5
            nxt = probe.follow(probe.logits.argmax())
            loop.append(loop.scores().argmax())
            pairs.append((nxt.logits.detach(), loop.logits))

    plain = subject.model.generate(**subject.inputs, **OPTIONS)
    with ab.steer(subject.model, Drive(run=run)):
        found = subject.model.generate(**subject.inputs, **OPTIONS)
        assert torch.equal(found, plain)
        with pytest.raises(ab.errors.Refused, match="inference_mode"), torch.inference_mode():
            subject.model.generate(**subject.inputs, **OPTIONS)
        with pytest.raises(ab.errors.Refused, match="DynamicCache"):
            subject.model.generate(**subject.inputs, **OPTIONS, **STATIC)
    assert all(off(*pair) < 2e-5 for pair in pairs)
    assert all(parameter.grad is None for parameter in subject.model.parameters())
