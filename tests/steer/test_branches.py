"""Branches and next-token scores: every cache, padding, sampling, models with images, refusals."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.errors import AttnbiasError, Refused
from attnbias.steer import Branch, Rule, SiteCall, Step
from attnbias.steer.rule import Heads
from tests.cases.rule import padded
from tests.steer.answering import answering, last_scores, without
from tests.steer.models import make, minilm, stories

TEXT = (3, 6)
GREEDY: dict[str, Any] = {
    "max_new_tokens": 6,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
}


@dataclass(frozen=True, kw_only=True)
class Guide(Rule):
    """Twice the model less the model without a span (or with other rules, or both)."""

    heads: Heads = "all"
    without: tuple[str, ...] = ("text",)
    inner: tuple[Rule, ...] = ()
    shared: bool = False
    answer: Any = None

    @property
    def branches(self) -> Mapping[str, Branch]:
        return {"bare": Branch(without=self.without, rules=self.inner, shared=self.shared)}

    def logits(self, step: Step) -> Tensor | None:
        if self.answer is not None:
            found: Tensor = self.answer(step)
            return found
        return 2 * step.logits - step.branch("bare").logits


@dataclass(frozen=True, kw_only=True)
class Watch(Rule):
    """Looks in main forwards and in branches, at whatever it is told."""

    heads: Heads = "all"
    see: Any = None

    @property
    def branches(self) -> Mapping[str, Branch]:
        return {"bare": Branch(without=("text",))}

    def look(self, site: SiteCall) -> Any:
        return (site.in_branch, site.key_positions, site.where(("tail",)))

    def logits(self, step: Step) -> Tensor | None:
        lane = step.branch("bare")
        self.see(step, lane)
        return None


@pytest.fixture
def decoder(request: pytest.FixtureRequest) -> Any:
    return stories(request.getfixturevalue("stories"))


def guided(model: Any, span: tuple[int, int] = TEXT) -> Any:
    """The same by plain forwards, row by row."""

    def scores(plain: Any, inputs: dict[str, Tensor], prompt: int) -> Tensor:
        return 2 * last_scores(plain, inputs) - last_scores(plain, without(inputs, span))

    return answering(model, scores)


def close(found: Tensor, wanted: Tensor) -> bool:
    return float((found - wanted).abs().max()) < 3e-5 * float(wanted.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("sample", [False, True])
def test_generate_with_every_cache_sampled_or_not(decoder: Any, cache: str, sample: bool) -> None:
    """Left padding, two sequences per prompt: the same tokens as without any cache or padding."""
    inputs, _, _ = padded(decoder, "left")
    inputs.pop("position_ids")
    options: dict[str, Any] = {
        **GREEDY,
        "do_sample": sample,
        "num_return_sequences": 2 if sample else 1,
    }
    other = decoder.eager()
    torch.manual_seed(0)
    with guided(other):
        wanted = other.generate(**inputs, **options)
    torch.manual_seed(0)
    with ab.steer(decoder.model, Guide(), spans={"text": TEXT}):
        if cache == "static":
            options["cache_implementation"] = "static"
        found = decoder.model.generate(**inputs, **options)
    assert torch.equal(found, wanted)
    assert not torch.equal(found, decoder.model.generate(**inputs, **GREEDY)[:, : found.shape[1]])


@torch.no_grad()
def test_spans_of_each_row_and_prompts_of_other_lengths(decoder: Any) -> None:
    """Rows lose different numbers of tokens."""
    ids = decoder.inputs["input_ids"]
    spans = [(1, 3), (4, 9)]
    with ab.steer(decoder.model, Guide(), spans={"text": spans}):
        found = decoder.run()[:, -1]
        tokens = decoder.model.generate(ids, **GREEDY)
    for row, span in enumerate(spans):
        one = {"input_ids": ids[row : row + 1]}
        wanted = 2 * last_scores(decoder.model, one) - last_scores(
            decoder.model, without(one, span)
        )
        assert close(found[row], wanted)
        other = decoder.eager()
        with guided(other, span):
            assert torch.equal(tokens[row], other.generate(**one, **GREEDY)[0])


@torch.no_grad()
def test_only_the_last_score_is_touched_wherever_it_stands(decoder: Any) -> None:
    ids = decoder.inputs["input_ids"]
    plain = decoder.run()
    with ab.steer(decoder.model, Guide(), spans={"text": TEXT}):
        whole = decoder.run()
        last = decoder.model(ids, logits_to_keep=1).logits
        pair = decoder.model(ids, return_dict=False)[0]
    assert torch.equal(whole[:, :-1], plain[:, :-1])
    assert close(last[:, -1], whole[:, -1])
    assert torch.equal(pair, whole)
    assert not close(whole[:, -1], plain[:, -1])


@torch.no_grad()
@pytest.mark.parametrize("prompt", ["its own", "shared"])
def test_chunks_steps_and_a_cropped_cache(decoder: Any, prompt: str) -> None:
    """What one pass gives: a prompt in chunks, and steps after the cache was taken back."""
    from transformers import DynamicCache

    ids = decoder.inputs["input_ids"]
    shared = prompt == "shared"
    blocked = ab.rules.BlockHeads(heads=((1, 0), (2, 1)))
    rule = Guide(shared=True, without=(), inner=(blocked,)) if shared else Guide()
    spans = None if shared else {"text": TEXT}
    with ab.steer(decoder.model, rule, spans=spans):
        wanted = decoder.model(ids).logits[:, -1]
        cache = DynamicCache(config=decoder.model.config)
        for part in (ids[:, :4], ids[:, 4:9], ids[:, 9:]):
            found = decoder.model(part, past_key_values=cache, use_cache=True).logits[:, -1]
        assert close(found, wanted)
        token = ids[:, 2:3]
        first = decoder.model(token, past_key_values=cache, use_cache=True).logits[:, -1]
        for _ in range(2):
            decoder.model(ids[:, 5:6], past_key_values=cache, use_cache=True)
        cache.crop(-3)
        again = decoder.model(token, past_key_values=cache, use_cache=True).logits[:, -1]
    assert not close(first, wanted)
    assert shared or close(again, first)  # a shared branch begins at the prompt's last token


@torch.no_grad()
def test_a_shared_prompt_is_the_prompt_run_again(decoder: Any) -> None:
    """Blocked heads act from the prompt's last token on, whichever way the branch got there."""
    ids = decoder.inputs["input_ids"]
    blocked = ab.rules.BlockHeads(heads=((1, 0), (2, 1), (3, 3)))
    rule = Guide(without=(), inner=(blocked,), shared=True)
    first = decoder.model(ids[:, :-1], use_cache=True)
    with ab.steer(decoder.model, blocked):
        other = decoder.model(ids[:, -1:], past_key_values=first.past_key_values).logits[:, -1]
    wanted = 2 * decoder.run()[:, -1] - other
    with ab.steer(decoder.model, rule):
        copied = decoder.run()[:, -1]
        rerun = decoder.run(use_cache=False)[:, -1]
    assert close(copied, wanted)
    assert close(rerun, wanted)


@torch.no_grad()
def test_other_rules_act_in_the_branch_on_its_own_positions(decoder: Any) -> None:
    ids = decoder.inputs["input_ids"]
    shift = ab.rules.KeyShift(keys=("tail",), factor=5.0, heads="all")
    spans = {"text": TEXT, "tail": (7, 9)}
    with ab.steer(decoder.model, shift, spans=spans):
        main = decoder.run()[:, -1]
    with ab.steer(decoder.model, shift, spans={"tail": (4, 6)}):
        bare = decoder.model(without({"input_ids": ids}, TEXT)["input_ids"]).logits[:, -1]
    with ab.steer(decoder.model, shift, Guide(), spans=spans):
        assert close(decoder.run()[:, -1], 2 * main - bare)
    with (
        ab.steer(decoder.model, shift, spans=spans),
        ab.steer(decoder.model, Guide(), spans={"text": TEXT}),
    ):
        assert close(decoder.run()[:, -1], 2 * main - bare)


@torch.no_grad()
def test_a_rule_looks_in_its_branch(decoder: Any) -> None:
    seen: list[Any] = []

    def see(step: Step, lane: Any) -> None:
        main, bare = (list(found.values()) for found in (step.looked, lane.looked))
        seen.append((step.number, main[0], bare[0], step.where(("tail",)).nonzero()[:, 1]))

    spans = {"text": TEXT, "tail": (7, 9)}
    with (
        ab.observe(decoder.model, [ab.statistics.Received()]) as record,
        ab.steer(decoder.model, Watch(see=see), spans=spans),
    ):
        decoder.model.generate(decoder.inputs["input_ids"][:1], **{**GREEDY, "max_new_tokens": 3})
    numbers, main, bare, tail = zip(*seen, strict=True)
    assert numbers == (0, 1, 2)
    assert main[0][0] == ""
    assert bare[0][0] == "bare"
    assert main[2][1].tolist() == [list(range(15))]
    assert bare[2][1].tolist() == [list(range(12))]
    assert main[0][2].nonzero()[:, 1].tolist() == [7, 8] == tail[0].tolist()
    assert bare[0][2].nonzero()[:, 1].tolist() == [4, 5]
    assert record.tensor("received")  # the branch's forwards were not seen: lengths differ


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_images_left_out_with_their_pixels(name: str, request: pytest.FixtureRequest) -> None:
    subject: Any = make(name, request)
    given = dict(subject.inputs)
    ids = given.pop("input_ids")
    cut = torch.cat([ids[:, :2], ids[:, 6:]], 1)
    kinds = {"mm_token_type_ids", "token_type_ids"} & given.keys()
    rest = {kind: torch.cat([given[kind][:, :2], given[kind][:, 6:]], 1) for kind in kinds}
    plain = subject.run()[:, -1]
    bare = subject.model(input_ids=cut, **rest).logits[:, -1]
    rule = Guide(without=("image",), towers=("text",))
    with ab.steer(subject.model, rule, spans={"image": (2, 6)}):
        found = subject.run()[:, -1]
        tokens = subject.model.generate(**subject.inputs, **GREEDY)
    assert close(found, 2 * plain - bare)
    assert not close(found, plain)
    text = tokens[:, :16]
    assert torch.equal(text, ids)
    for length in (17, 19):  # what was generated, by whole passes over it
        whole, less = tokens[:, :length], torch.cat([cut, tokens[:, 16:length]], 1)
        more = {k: torch.nn.functional.pad(given[k], (0, length - 16)) for k in kinds}
        short = {k: torch.nn.functional.pad(rest[k], (0, length - 16)) for k in kinds}
        main = subject.model(**{**given, **more}, input_ids=whole).logits[:, -1]
        scores = 2 * main - subject.model(input_ids=less, **short).logits[:, -1]
        assert torch.equal(tokens[:, length], scores.argmax(-1))
    assert torch.equal(subject.run()[:, -1], plain)


@torch.no_grad()
def test_some_of_several_images_cannot_be_left_out(request: pytest.FixtureRequest) -> None:
    subject: Any = make("llava", request)
    rule = Guide(without=("image",), towers=("text",))
    with (
        pytest.raises(Refused, match="leave out all or none"),
        ab.steer(subject.model, rule, spans={"image": [(2, 6), (8, 9)]}),
    ):
        subject.run()


@torch.no_grad()
def test_beams_and_other_ways_of_decoding_are_refused(decoder: Any) -> None:
    ids = decoder.inputs["input_ids"]
    with ab.steer(decoder.model, Guide(), spans={"text": TEXT}):
        with pytest.raises(Refused, match="num_beams"):
            decoder.model.generate(ids, **GREEDY, num_beams=2)
        with pytest.raises(Refused, match="prompt_lookup"):
            decoder.model.generate(ids[:1], **GREEDY, prompt_lookup_num_tokens=2)
        out = decoder.model(ids, use_cache=True)
        out.past_key_values.reorder_cache(torch.tensor([1, 0]))
        with pytest.raises(Refused, match="beams change places"):
            decoder.model(ids[:, :1], past_key_values=out.past_key_values)
    with (
        ab.steer(decoder.model, detector(), spans={"document 0": TEXT}),
        pytest.raises(Refused, match="prompt_lookup"),
    ):
        decoder.model.generate(ids[:1], **GREEDY, prompt_lookup_num_tokens=2)


def detector() -> Rule:
    return ab.rules.DAGCD(heads=((0, 0),), coefficients=(1.0,))


@torch.no_grad()
def test_a_cache_from_before_is_refused_where_a_branch_is_asked_for(decoder: Any) -> None:
    ids = decoder.inputs["input_ids"]
    cache = decoder.model(ids, use_cache=True).past_key_values
    with (
        ab.steer(decoder.model, Guide(), spans={"text": TEXT}),
        pytest.raises(Refused, match="prefill inside the context"),
    ):
        decoder.model(ids[:, :1], past_key_values=cache)


@torch.no_grad()
def test_several_sequences_at_once_and_copies_of_a_cache(decoder: Any) -> None:
    """Each cache has its own branch; the caller's caches are left clean."""
    ids = decoder.inputs["input_ids"]
    one, two = ids[:1], ids[1:]
    step = ids[:1, 3:4]
    with ab.steer(decoder.model, Guide(), spans={"text": TEXT}):
        first = decoder.model(one, use_cache=True).past_key_values
        second = decoder.model(two, use_cache=True).past_key_values
        found = decoder.model(step, past_key_values=first).logits[:, -1]
        decoder.model(step, past_key_values=second)
        wanted = decoder.model(torch.cat([one, step], 1)).logits[:, -1]
        other = copy.deepcopy(second)
        other.reorder_cache(torch.tensor([0]))
        decoder.model(step, past_key_values=second)
    assert close(found, wanted)
    assert "reorder_cache" not in vars(second)


@torch.no_grad()
def test_what_goes_wrong_in_a_branch_leaves_the_model_as_it_was(decoder: Any) -> None:
    plain = decoder.run()
    layer = decoder.model.model.layers[2]
    calls = []

    def fail(module: Any, args: Any, given: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("in the branch")

    handle = layer.register_forward_pre_hook(fail, with_kwargs=True)
    spans = {"text": TEXT}
    with ab.steer(decoder.model, Guide(), spans=spans):
        with pytest.raises(RuntimeError, match="in the branch"):
            decoder.run()
        handle.remove()
        found = decoder.run()
    assert close(found[:, :-1], plain[:, :-1])
    assert torch.equal(decoder.run(), plain)
    assert "generate" not in vars(decoder.model)


@torch.no_grad()
def test_refusals_in_one_sentence(decoder: Any, request: pytest.FixtureRequest) -> None:
    spans = {"text": TEXT, "all": (0, 13), "open": (3, None)}
    cases: list[tuple[Rule, type[Exception], str]] = [
        (Guide(without=("all",)), Refused, "leaves out every token"),
        (Guide(without=("open",)), AttnbiasError, "no end"),
        (Guide(answer=lambda step: step.branch("other").logits), AttnbiasError, "no branch"),
        (Guide(answer=lambda step: step.logits[:, :3]), AttnbiasError, "must return the shape"),
    ]
    for rule, error, words in cases:
        with pytest.raises(error, match=words), ab.steer(decoder.model, rule, spans=spans):
            decoder.run()
    with pytest.raises(AttnbiasError, match="shared=True"):
        Branch(shared=True, without=("text",))
    encoder = minilm(request.getfixturevalue("minilm"))
    with (
        pytest.raises(Refused, match="language-model head"),
        ab.steer(encoder.model, Guide(), spans=spans),
    ):
        encoder.run()


@torch.no_grad()
def test_bfloat16(decoder: Any) -> None:
    model = decoder.model.to(torch.bfloat16)
    ids = decoder.inputs["input_ids"]
    with ab.steer(model, Guide(), spans={"text": TEXT}):
        found = model(ids).logits
    cut = without({"input_ids": ids}, TEXT)["input_ids"]
    wanted = 2 * model(ids).logits[:, -1].float() - model(cut).logits[:, -1].float()
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[:, -1], wanted.to(torch.bfloat16))


@torch.no_grad()
def test_peft(decoder: Any) -> None:
    """The adapter's generate goes to the model inside: the branch follows it there."""
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(decoder.model, config).eval()
    ids = decoder.inputs["input_ids"]
    with ab.steer(model, Guide(), spans={"text": TEXT}):
        tokens = model.generate(input_ids=ids, **GREEDY)
    for length in (13, 16):
        whole = tokens[:, :length]
        cut = without({"input_ids": whole}, TEXT)["input_ids"]
        scores = 2 * model(whole).logits[:, -1] - model(cut).logits[:, -1]
        assert torch.equal(tokens[:, length], scores.argmax(-1))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_text_left_out_of_a_prompt_with_an_image(name: str, request: pytest.FixtureRequest) -> None:
    """The image stays, what follows the text moves up, also where inputs come encoded already."""
    subject: Any = make(name, request)
    start, stop = 9, 12
    rule = Guide(without=("some",), towers=("text",))
    with ab.steer(subject.model, rule, spans={"some": (start, stop)}):
        found = subject.run()[:, -1]
        tokens = subject.model.generate(**subject.inputs, **GREEDY)
    kinds = {"mm_token_type_ids", "token_type_ids"} & subject.inputs.keys()

    def scores(length: int, left_out: bool) -> Tensor:
        given = {**subject.inputs, "input_ids": tokens[:, :length]}
        for kind in kinds:
            given[kind] = torch.nn.functional.pad(given[kind], (0, length - 16))
        if left_out:
            for part in ("input_ids", *kinds):
                given[part] = torch.cat([given[part][:, :start], given[part][:, stop:]], 1)
        logits: Tensor = subject.model(**given).logits[:, -1]
        return logits

    assert close(found, 2 * scores(16, False) - scores(16, True))
    for length in (16, 17, 20):
        wanted = 2 * scores(length, False) - scores(length, True)
        assert torch.equal(tokens[:, length], wanted.argmax(-1))
