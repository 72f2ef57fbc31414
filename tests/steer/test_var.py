from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

import attnbias as ab
from tests.cases.rule import RELATIVE, RuleCase, off
from tests.steer.dense import DenseEdit, Map, rewritten
from tests.steer.models import Subject, make, tokens

DIMS, TAU, SUMM, RHO = (12, 18, 28, 29), 1.4, 0.0, 1.0
START, STOP = 1, 5  # the image
SUBJECTS = (
    "stories", "minilm", "mistral", "gpt_oss", "bart encoder", "llava", "qwen2_vl", "gemma3",
)  # fmt: skip


class Inputs:
    """The input of the layer that runs, by a plain hook on every layer of every model."""

    def __init__(self) -> None:
        self.last = torch.zeros(0)

    def __call__(self, module: nn.Module, args: Any) -> None:
        if type(module).__name__.endswith("Layer"):
            self.last = args[0].detach()


@pytest.fixture(autouse=True)
def inputs() -> Iterator[Inputs]:
    global SEEN
    SEEN = Inputs()
    hook = register_module_forward_pre_hook(SEEN)
    yield SEEN
    hook.remove()


SEEN = Inputs()


def large(hidden: Tensor, dims: tuple[int, ...] = DIMS, tau: float = TAU) -> Tensor:
    hidden = hidden.double()
    scale = (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return (hidden[..., list(dims)].abs() / scale).amax(-1) > tau


def redistribute(
    p: Tensor, sink: Tensor, image: Tensor, after: Tensor, keep: float, summ: float, rho: float
) -> Tensor:
    """The authors' code, with masks. sink, image: (batch, keys); after: (batch | 1, queries)."""
    sink, image = sink[:, None, None], image[:, None, None]
    looks = (p * image).sum(-1, keepdim=True)
    visual = (p * (image & sink)).sum(-1, keepdim=True)
    budget = (1 - keep) * (p * sink).sum(-1, keepdim=True)
    rest = p * (image & ~sink)
    total = rest.sum(-1, keepdim=True)
    some = (image & sink).any(-1, keepdim=True)
    on = after[:, None, :, None] & some & (looks >= summ) & (visual / looks <= rho)
    on = on & (total > 1e-30)
    new = torch.where(sink, keep * p, p) + budget * rest / torch.where(on, total, 1.0)
    return torch.where(on, new, p)


def with_words(name: str, request: pytest.FixtureRequest) -> Subject:
    """Tokens of the trained decoder that differ: its bytes were never trained and look alike."""
    subject = make(name, request)
    if subject.name == "stories":
        subject.inputs["input_ids"][:, 1:] += 300
    return subject


class TestVAR(RuleCase):
    __test__ = True
    zero, small, large = 1.0, 0.7, 0.05
    prompt = 0  # tokens that may be sinks; 0: all

    @pytest.fixture(autouse=True)
    def words(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tests.cases.rule.make", with_words)

    @pytest.fixture(params=SUBJECTS)
    def subject(self, request: pytest.FixtureRequest) -> Subject:
        return with_words(request.param, request)

    @pytest.fixture(params=SUBJECTS)
    def every(self, request: pytest.FixtureRequest) -> Subject:
        return with_words(request.param, request)

    def rule(self, strength: float, **where: Any) -> ab.rules.VAR:
        fields = {"dims": DIMS, "tau": TAU, "summ": SUMM, "rho": RHO, "start": 0}
        return ab.rules.VAR(p=strength, image=[range(START, STOP)], **(fields | where))

    def oracle(self, subject: Subject, model: Any, strength: Any, *given: Any, **where: Any) -> Any:
        """Forwards that are longer than the prompt of the subject keep the sinks of the prompt."""
        length = subject.inputs["input_ids"].shape[1] if "input_ids" in subject.inputs else 0
        longer = bool(given) and given[0] is not None and given[0].shape[1] > length
        self.prompt = length if longer else 0
        return super().oracle(subject, model, strength, *given, **where)

    def dense(self, strength: float) -> Callable[[Map], Tensor]:
        kept: list[Tensor] = []
        turn = [0]

        def rewrite(found: Map) -> Tensor:
            p, where = found.probabilities, found.positions.expand(len(found.probabilities), -1)
            if found.decoding:
                sink = kept[turn[0] % len(kept)]
                turn[0] += 1
                sink = torch.nn.functional.pad(sink, (0, p.shape[3] - sink.shape[1]))
                after = torch.ones(1, 1, dtype=torch.bool)
            else:
                sink = large(SEEN.last) & (where >= 0)
                if self.prompt:
                    sink[:, self.prompt :] = False
                kept.append(sink)
                after = where >= STOP
            image = (where >= START) & (where < STOP)
            return redistribute(p, sink, image, after, strength, SUMM, RHO)

        return rewrite

    @torch.no_grad()
    def test_chunked_prefill_and_every_cache(self, decoder: Subject) -> None:
        """What is frozen when: sinks are tokens of any chunk of the prompt; steps add none."""
        from transformers import DynamicCache, StaticCache

        ids = decoder.inputs["input_ids"]
        rule = self.rule(self.large, heads="all")
        assert not rule.row_local
        eager = decoder.eager()
        edit = DenseEdit(self.dense(self.large))
        self.prompt = 9
        with rewritten(eager, [edit], torch.arange(ids.shape[1])[None]):
            wanted = decoder.run(eager, use_cache=False)
        for chunks in ([9], [5, 4], [3, 4, 2]):
            for cache in (
                DynamicCache(config=decoder.model.config),
                StaticCache(config=decoder.model.config, max_cache_len=24),
            ):
                parts, start = [], 0
                with ab.steer(decoder.model, rule):
                    for size in [*chunks, 1, 1, 1, 1]:
                        part = ids[:, start : start + size]
                        out = decoder.model(input_ids=part, past_key_values=cache, use_cache=True)
                        parts.append(out.logits)
                        start += size
                assert off(torch.cat(parts, 1), wanted) < RELATIVE, (chunks, type(cache).__name__)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_rows_and_heads_are_chosen_by_the_published_rule(
    name: str, request: pytest.FixtureRequest
) -> None:
    """On the span of a real image, with summ and rho that some rows pass and some do not."""
    subject = make(name, request)
    eager = subject.eager()
    chosen: list[float] = []

    def rewrite(found: Map) -> Tensor:
        sink = large(SEEN.last)
        image = torch.zeros_like(sink)
        image[:, 2:6] = True
        after = torch.arange(16)[None] >= 6
        new = redistribute(found.probabilities, sink, image, after, 0.6, 0.2, 0.5)
        chosen.append(float((new != found.probabilities).any(-1)[:, :, 6:].double().mean()))
        return new

    layers = [1, 2]
    edit = DenseEdit(rewrite, layers, towers=("text",))
    with rewritten(eager, [edit], torch.arange(16)[None]):
        wanted = subject.run(eager)
    rule = ab.rules.VAR(dims=DIMS, tau=TAU, heads="all", towers=("text",), start=1)
    plain = subject.run()
    with ab.steer(subject.model, rule, spans=subject.spans):
        found = subject.run()
    assert 0.02 < sum(chosen) / len(chosen) < 0.98
    assert off(found, wanted) < RELATIVE
    assert off(plain, wanted) > 30 * RELATIVE


def test_defaults_are_the_published_ones() -> None:
    rule = ab.rules.VAR(heads="all")
    assert (rule.tau, rule.rho, rule.summ, rule.p, rule.start) == (20.0, 0.5, 0.2, 0.6, 2)
    assert rule.needs == ("image",)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dims": (-1,)}, "dims and start must be whole"),
        ({"dims": (1.5,)}, "dims and start must be whole"),
        ({"start": -1}, "dims and start must be whole"),
        ({"tau": -1.0}, "tau must be from 0"),
        ({"rho": 1.5}, "rho must be from 0 to 1"),
        ({"summ": True}, "summ must be from 0 to 1"),
        ({"p": 2.0}, "p must be from 0 to 1"),
    ],
)
def test_bad_fields(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ab.AttnbiasError, match=words):
        ab.rules.VAR(heads="all", **fields)


def test_what_is_missing_is_refused(request: pytest.FixtureRequest) -> None:
    model = make("stories", request).model
    with (
        pytest.raises(ab.Refused, match=r"\.fit\(model, prompts\)"),
        ab.steer(model, ab.rules.VAR(heads="all"), spans={"image": (0, 2)}),
    ):
        pass
    rule = ab.rules.VAR(heads="all", dims=(999,), start=0)
    with (
        pytest.raises(ab.AttnbiasError, match="dimension 999, but"),
        ab.steer(model, rule, spans={"image": (0, 2)}),
    ):
        model(input_ids=tokens(1, 6))
    bart = make("bart cross", request)
    rule = ab.rules.VAR(heads="all", dims=DIMS, start=0, towers=("cross",))
    with (
        pytest.raises(ab.Refused, match=r"towers=\('decoder',\)"),
        ab.steer(bart.model, rule, spans={"image": (0, 2)}),
    ):
        bart.run()


# Fitting ------------------------------------------------------------------------------------------


def planted(request: pytest.FixtureRequest, dims: dict[int, float], decoy: int) -> nn.Module:
    """The first token's embedding is massive in some dimensions, every token's in the decoy."""
    model: nn.Module = make("mistral", request).model
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[:, decoy] = 400.0
        for dim, value in dims.items():
            table[1, dim] = value
            table[2:, dim] *= 0.1
    return model


def prompts(count: int = 3) -> list[dict[str, Tensor]]:
    ids = tokens(count, 12, seed=8)
    ids[:, 0] = 1
    return [{"input_ids": row[None]} for row in ids]


def test_fit_finds_the_planted_dimensions(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Those in which the first token alone is massive; one that is large everywhere is none."""
    model = planted(request, {21: 900.0, 5: -700.0}, decoy=13)
    rule = ab.rules.VAR(heads="all", tau=2.5).fit(model, prompts(), progress=False)
    assert rule.dims == (21, 5)
    record = rule.fitted
    assert record is not None
    assert record.prompts == 3
    assert min(record.scores) > 2.5 > max(record.others)
    hidden = []
    for one in prompts():
        with torch.no_grad():
            states = model(**one, output_hidden_states=True).hidden_states
        for state in states[2:-1]:  # the inputs of layers 2 and on
            size = state[0].double()
            hidden.append((size / size.square().mean(-1, keepdim=True).sqrt()).abs())
    wanted = torch.stack(hidden)[:, 0].mean(0)
    assert record.scores == pytest.approx([float(wanted[21]), float(wanted[5])], rel=1e-4)
    one = ab.rules.VAR(heads="all", tau=2.5).fit(model, prompts(), count=1, progress=False)
    assert one.dims == (21,)
    assert one.fitted is not None
    assert one.fitted.next_best > 2.5
    recipe = ab.Recipe((rule,), "some/model")
    recipe.save(tmp_path / "recipe.json")
    assert ab.Recipe.load(tmp_path / "recipe.json") == recipe
    with ab.steer(model, rule, spans={"image": (2, 6)}):
        model(**prompts()[0])


def test_fit_shows_its_progress_and_padding_does_not_matter(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.progress import Progress

    steps: list[float] = []
    monkeypatch.setattr(Progress, "advance", lambda self, task, advance=1: steps.append(advance))
    model = planted(request, {21: 900.0}, decoy=13)
    alone = ab.rules.VAR(heads="all", tau=2.5).fit(model, prompts())
    assert len(steps) == 3
    padded = [
        {
            "input_ids": torch.nn.functional.pad(one["input_ids"], (4, 0)),
            "attention_mask": torch.nn.functional.pad(torch.ones(1, 12).long(), (4, 0)),
        }
        for one in prompts()
    ]
    found = ab.rules.VAR(heads="all", tau=2.5).fit(model, padded, progress=False)
    assert found.dims == alone.dims
    assert found.fitted is not None
    assert alone.fitted is not None
    assert found.fitted.scores == pytest.approx(alone.fitted.scores, rel=1e-4)


def test_fit_refuses_in_one_sentence(request: pytest.FixtureRequest) -> None:
    model = make("mistral", request).model
    for given, words in (
        ({"prompts": []}, "fit needs prompts"),
        ({"prompts": ["text"]}, "fit needs prompts.*got str"),
        ({"count": 0}, "count must be"),
        ({}, "no dimension of the first token is above tau=20"),
    ):
        with pytest.raises(ab.AttnbiasError, match=words) as caught:
            ab.rules.VAR(heads="all").fit(
                model, **({"prompts": prompts(1), "progress": False} | given)
            )
        assert "\n" not in str(caught.value)
    with pytest.raises(ab.AttnbiasError, match=r"model\.eval\(\)"):
        ab.rules.VAR(heads="all").fit(model.train(), prompts(1), progress=False)
