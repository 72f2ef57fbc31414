"""What ALFAR, AVISC, DeCoRe, DAGCD and VHR promise beside their oracle: masks, fits, refusals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

import attnbias as ab
from attnbias.errors import AttnbiasError, Refused
from attnbias.steer import Branch, Rule, SiteCall, Step
from attnbias.steer.retrieval import logistic, shares
from attnbias.steer.rule import Heads
from tests.steer.models import Subject, make, stories


@dataclass(frozen=True, kw_only=True)
class Probe(Rule):
    """Calls what it is given and changes nothing."""

    heads: Heads = "all"
    see: Any
    after: Any = None

    def look(self, site: SiteCall) -> Any:
        return self.see(site)

    def logits(self, step: Step) -> torch.Tensor | None:
        if self.after is not None:
            self.after(step)
        return None


@dataclass(frozen=True, kw_only=True)
class Diverge(Rule):
    """VHR's divergences, of the model as it is."""

    heads: Heads = "all"
    kept: dict[int, torch.Tensor]

    @property
    def branches(self) -> Mapping[str, Branch]:
        return ab.rules.VHR().branches

    def look(self, site: SiteCall) -> torch.Tensor | None:
        return ab.rules.VHR().look(site)

    def outputs(self, site: SiteCall, out: torch.Tensor) -> torch.Tensor | None:
        self.kept[site.site.layer] = ab.rules.VHR(outliers=False).divergence(site)
        return None


def copying() -> tuple[Any, torch.Tensor, int]:
    """A GPT-2 whose head (1, 2) looks from token 2 at token 7 and says it; nothing else acts."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=12, n_embd=16, n_layer=2, n_head=4, n_positions=16)
    model: Any = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "ln_" not in name:
                weight.zero_()
        model.transformer.wte.weight.copy_(torch.eye(12, 16))
        attention = model.transformer.h[1].attn
        attention.c_attn.weight[2, 8] = 3.0  # queries of head 2
        attention.c_attn.weight[7, 16 + 8] = 3.0  # keys
        attention.c_attn.weight[7, 32 + 8] = 1.0  # values
        attention.c_proj.weight[8, 7] = 3.0
    return model, torch.tensor([[1, 3, 5, 7, 8, 6, 4, 2]]), 7


def _last(kept: list[torch.Tensor], site: SiteCall) -> None:
    kept.append(site.attention(slice(-1, None)))


SPANS = {"image": (2, 6), "question": (6, 7), "document 0": (7, 9)}


@pytest.fixture
def decoder(request: pytest.FixtureRequest) -> Subject:
    return stories(request.getfixturevalue("stories"))


@torch.no_grad()
@pytest.mark.parametrize("rule", [ab.rules.ALFAR(heads="all"), ab.rules.AVISC()])
def test_implausible_tokens_are_out(decoder: Subject, rule: Any) -> None:
    plain = decoder.run()[:, -1]
    base = plain
    if isinstance(rule, ab.rules.ALFAR):  # the mask reads the scores under the reallocation
        moved = ab.rules.ALFAR(heads="all", fusion=False)
        with ab.steer(decoder.model, moved, spans=SPANS):
            base = decoder.run()[:, -1]
    with ab.steer(decoder.model, rule, spans=SPANS):
        found = decoder.run()[:, -1]
    low = base < base.amax(-1, keepdim=True) + math.log(rule.plausibility)
    assert torch.equal(found == -torch.inf, low)
    assert low.any()
    assert not low.all()


@torch.no_grad()
@pytest.mark.parametrize("form", ["paper", "magnitude", "share"])
def test_alfar_moves_attention_the_way_it_means(decoder: Subject, form: Any) -> None:
    """Image shares fall and context shares rise, except where raw scores have the other sign."""
    rule = ab.rules.ALFAR(heads="all", form=form, strength=0.4, fusion=False)
    maps: list[torch.Tensor] = []
    scores: list[torch.Tensor] = []

    def look(site: SiteCall) -> None:
        maps.append(site.attention(slice(-1, None))[:, :, 0])
        scores.append(site.scores(slice(-1, None))[:, :, 0])

    probe = Probe(see=look, layers=(0,))
    with ab.steer(decoder.model, probe):
        decoder.run()
    with ab.steer(decoder.model, rule, probe, spans=SPANS):
        decoder.run()
    raw, (before, after) = scores[0], maps
    log_ratio = after.log() - before.log()
    rest = log_ratio[..., 9:10]  # what is neither is only normalised again
    change = log_ratio - rest
    assert change[..., 9:].abs().max() < 1e-4
    assert change[..., :2].abs().max() < 1e-4
    image, negative = change[..., 2:6], raw[..., 2:6] < 0
    assert negative.any()
    if form == "paper":
        assert (image[negative] > 0).all()
        assert (image[~negative] < 0).all()
    else:
        assert (image < 0).all()
        assert (change[..., 7:9] > -1e-5).all()
    if form == "share":
        assert torch.allclose(image, torch.tensor(math.log(0.6)), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("spans", [SPANS, {**SPANS, "question": (9, 11)}])
def test_alfar_weights_and_a_prompt_in_chunks(decoder: Subject, spans: Any) -> None:
    """The weights of a prompt in chunks are those of the whole, on either side of the question."""
    from transformers import DynamicCache

    ids = decoder.inputs["input_ids"]
    alone = ab.rules.ALFAR(heads="all", strength=2.0, fusion=False, layers=(0,))
    whole = []
    for sizes in ((13,), (5, 3, 5), (8, 2, 3)):
        kept: list[Any] = []
        see = partial(_last, kept)
        probe = Probe(see=see, layers=(0,))
        with ab.steer(decoder.model, alone, probe, spans=spans):
            cache, start = DynamicCache(config=decoder.model.config), 0
            for size in sizes:
                part = ids[:, start : start + size]
                decoder.model(part, past_key_values=cache, use_cache=True)
                start += size
        whole.append(kept[-1])
    # The last query of every chunk is edited, as the work's is; below the first layer none is.
    for other in whole[1:]:
        assert torch.allclose(other, whole[0], atol=1e-4)


@torch.no_grad()
def test_alfar_takes_one_similarity_per_prompt(decoder: Subject) -> None:
    def run(similarity: Any) -> torch.Tensor:
        rule = ab.rules.ALFAR(heads="all", similarity=similarity, fusion=False)
        with ab.steer(decoder.model, rule, spans=SPANS):
            return decoder.run()

    both = run((0.2, 0.9))
    assert torch.equal(both[0], run(0.2)[0])
    assert torch.equal(both[1], run(0.9)[1])
    with pytest.raises(AttnbiasError, match="3 prompts"):
        run((0.1, 0.2, 0.3))


@torch.no_grad()
def test_avisc_finds_what_stands_out(request: pytest.FixtureRequest) -> None:
    """A planted sink among the image's tokens is blind, and alone in it; all layers at share 1."""
    subject = make("llava", request)
    found: list[torch.Tensor] = []
    rule = ab.rules.AVISC(towers=("text",))
    probe = Probe(
        see=rule.look, after=lambda step: found.append(rule.blind(step)), towers=("text",)
    )
    sink = ab.rules.KeyShift(keys=(4,), factor=1e4, heads="all", towers=("text",))
    with ab.steer(subject.model, sink), ab.steer(subject.model, probe, spans={"image": (2, 6)}):
        subject.run()
    assert found[0].nonzero().tolist() == [[0, 4], [1, 4]]


def test_decore_without_blocked_heads_is_greedy(decoder: Subject) -> None:
    """A branch that equals the model changes no choice, whatever alpha."""
    wide = ab.rules.DeCoRe(heads=((0, 0),), layers=(1,), strength=3.0)
    with torch.no_grad():
        plain = decoder.run()[:, -1]
        with ab.steer(decoder.model, wide):
            found = decoder.run()[:, -1]
    assert torch.allclose(found, plain.log_softmax(-1), atol=1e-3)
    assert torch.equal(found.argmax(-1), plain.argmax(-1))


def test_fits_find_the_planted_heads() -> None:
    """A head that copies is found by both fits, among heads that do not."""
    model, ids, answer = copying()
    needle = ab.rules.Needle({"input_ids": ids}, (2, 6), (answer,))
    found = ab.rules.DeCoRe(heads="all").fit(model, [needle] * 2, count=1, progress=False)
    assert found.heads == ((1, 2),)
    assert found.scores == (1.0,)
    examples = [
        ab.rules.ContextExample({"input_ids": ids}, (2, 6), (answer,)),
        ab.rules.ContextExample({"input_ids": ids}, (2, 6), (5,)),  # never said: left out
    ]
    rule = ab.rules.DAGCD(heads="all", top_rank=1).fit(model, examples, count=2, progress=False)
    assert (1, 2) in rule.heads
    place = list(rule.heads).index((1, 2))
    assert rule.coefficients[place] == max(rule.coefficients)
    wrong = ab.rules.Needle({"input_ids": ids}, (4, 6), (answer,))
    with pytest.raises(AttnbiasError, match="not in the needle"):
        ab.rules.DeCoRe(heads="all").fit(model, [wrong], progress=False)


def test_logistic_regression_is_the_usual_one() -> None:
    from sklearn.linear_model import LogisticRegression

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 5, generator=generator)
    y = (x[:, 0] - 0.5 * x[:, 3] + 0.7 * torch.randn(80, generator=generator) > 0.2).float()
    weights, intercept = logistic(x, y)
    other = LogisticRegression(tol=1e-10, max_iter=1000).fit(x.double().numpy(), y.double().numpy())
    assert torch.allclose(weights, torch.tensor(other.coef_[0]), atol=1e-4)
    assert abs(float(intercept) - float(other.intercept_[0])) < 1e-4


def test_shares_average_repeated_tokens() -> None:
    attention = torch.tensor([[0.1, 0.2, 0.3], [0.0, 0.4, 0.0]])
    distinct, found = shares(attention, torch.tensor([7, 5, 7]))
    assert distinct.tolist() == [5, 7]
    assert torch.allclose(found[:, 0], torch.tensor([0.5, 0.5]))
    assert torch.allclose(found[:, 1], torch.tensor([1.0, 0.0]))


@torch.no_grad()
def test_dagcd_leaves_an_end_token_alone(decoder: Subject) -> None:
    plain = decoder.run()[:, -1]
    ends = tuple(plain.argmax(-1).tolist())
    given: dict[str, Any] = {"heads": ((0, 0),), "coefficients": (1.0,), "top_rank": 1000}
    with ab.steer(decoder.model, ab.rules.DAGCD(**given, end_tokens=ends[:1]), spans=SPANS):
        found = decoder.run()[:, -1]
    assert torch.equal(found[0], plain[0])
    assert ends[0] == ends[1] or not torch.equal(found[1], plain[1])


@torch.no_grad()
def test_heads_that_cannot_see_the_image_do_not_diverge(request: pytest.FixtureRequest) -> None:
    """A window hides the image from the last query of the first layer, not from those above."""
    subject = make("mistral", request)
    kept: dict[int, torch.Tensor] = {}
    with ab.steer(subject.model, Diverge(kept=kept), spans={"image": (2, 6)}):
        subject.run()
    assert kept[0].shape == (2, 4)
    assert float(kept[0].max()) < 1e-5
    assert float(kept[1].max()) > 0.1


@pytest.mark.parametrize(
    ("make_rule", "words"),
    [
        (lambda: ab.rules.ALFAR(heads="all", strength=-1.0), "strength"),
        (lambda: ab.rules.ALFAR(heads="all", similarity=1.5), "similarity"),
        (lambda: ab.rules.ALFAR(heads="all", form="other"), "form"),  # type: ignore[arg-type]
        (lambda: ab.rules.ALFAR(heads="all", form="share", strength=1.0), "below 1"),
        (lambda: ab.rules.ALFAR(heads="all", plausibility=0.0), "plausibility"),
        (lambda: ab.rules.AVISC(share=0.0), "share"),
        (lambda: ab.rules.AVISC(strength=math.nan), "strength"),
        (lambda: ab.rules.BlockHeads(heads=[0], mode="off"), "mode"),  # type: ignore[arg-type]
        (lambda: ab.rules.DeCoRe(heads="all", strength=-0.1), "strength"),
        (lambda: ab.rules.DeCoRe(heads="all", mode="off"), "mode"),  # type: ignore[arg-type]
        (lambda: ab.rules.DAGCD(heads="all", coefficients=(1.0,)), "coefficients"),
        (lambda: ab.rules.DAGCD(heads="all", top_rank=0), "top_rank"),
        (lambda: ab.rules.VHR(strength=0.0), "strength"),
    ],
)
def test_bad_numbers(make_rule: Any, words: str) -> None:
    with pytest.raises(AttnbiasError, match=words):
        make_rule()


def test_what_is_missing_is_refused_with_the_line_to_run(decoder: Subject) -> None:
    for rule in (ab.rules.DeCoRe(heads="all"), ab.rules.DAGCD(heads="all")):
        with pytest.raises(Refused, match="fit"), ab.steer(decoder.model, rule, spans=SPANS):
            pass
    for needing in (ab.rules.AVISC(), ab.rules.VHR(), ab.rules.ALFAR(heads="all")):
        with pytest.raises(AttnbiasError, match="span"), ab.steer(decoder.model, needing):
            pass


def cut(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A prompt of text and image without its image."""
    ids = inputs["input_ids"]
    kinds = {n: v for n, v in inputs.items() if v.shape == ids.shape}
    return {n: torch.cat([v[:, :2], v[:, 6:]], 1) for n, v in kinds.items()}


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_vhr_by_hooks_on_output_projections(name: str, request: pytest.FixtureRequest) -> None:
    subject: Any = make(name, request)
    layers = subject.model.model.language_model.layers
    heads = subject.model.config.get_text_config().num_attention_heads
    blank: dict[int, torch.Tensor] = {}

    def record(layer: int, module: Any, args: Any) -> None:
        blank[layer] = args[0][:, -1].unflatten(-1, (heads, -1))

    def scale(layer: int, module: Any, args: Any) -> Any:
        whole = args[0].unflatten(-1, (heads, -1))
        found = (whole[:, -1] - blank[layer]).norm(dim=-1)
        found = found.masked_fill(found < 1e-4 * whole[:, -1].norm(dim=-1), 0.0)  # sees no image
        size = blank[layer].square().sum(-1)
        for values in (found, size):
            assert values.shape == (2, heads)
        high = [v > v.mean(-1, True) + v.std(-1, correction=0, keepdim=True) for v in (found, size)]
        found = found.masked_fill(high[0] & high[1], 0.0)
        middle = found.sort(-1).values[:, heads // 2 - 1 : heads // 2 + 1].mean(-1, True)
        factor = torch.where(found > middle, 2.0, 1.0)[:, None, :, None]
        return ((whole * factor).flatten(2),)

    def run(hook: Any, inputs: Any) -> torch.Tensor:
        handles = [
            layer.self_attn.o_proj.register_forward_pre_hook(partial(hook, number))
            for number, layer in enumerate(layers)
        ]
        logits: torch.Tensor = subject.model(**inputs).logits
        for handle in handles:
            handle.remove()
        return logits

    run(record, cut(subject.inputs))
    wanted = run(scale, subject.inputs)
    plain = subject.run()
    with ab.steer(subject.model, ab.rules.VHR(towers=("text",)), spans={"image": (2, 6)}):
        found = subject.run()
    size = float(wanted.abs().max())
    assert float((found - wanted).abs().max()) < 1e-4 * size
    assert float((plain - wanted).abs().max()) > 1e-2 * size


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3"])
def test_avisc_by_a_hook_on_embeddings(name: str, request: pytest.FixtureRequest) -> None:
    subject: Any = make(name, request)
    kept: list[torch.Tensor] = []
    rule = ab.rules.AVISC(towers=("text",), deviations=0.0, plausibility=1e-30)
    probe = Probe(see=rule.look, after=lambda step: kept.append(rule.blind(step)), towers=("text",))
    with ab.steer(subject.model, probe, spans={"image": (2, 6)}):
        plain = subject.run()[:, -1]
    image = (torch.arange(16) >= 2) & (torch.arange(16) < 6)
    empty = image & ~kept[0]
    assert empty.any(-1).all()

    def rewrite(module: Any, args: Any, given: dict[str, Any]) -> Any:
        return args, {**given, "inputs_embeds": given["inputs_embeds"] * ~empty[..., None]}

    handle = subject.model.model.language_model.register_forward_pre_hook(rewrite, with_kwargs=True)
    other = subject.run()[:, -1]
    handle.remove()
    with ab.steer(subject.model, rule, spans={"image": (2, 6)}):
        found = subject.run()[:, -1]
        tokens = subject.model.generate(
            **subject.inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    wanted = 3.5 * plain - 2.5 * other
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
    assert torch.equal(tokens[:, 16], wanted.argmax(-1))
