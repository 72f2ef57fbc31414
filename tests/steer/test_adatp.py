"""AdaTP beside a plain rewrite: the choice of tokens by loops, the drop by hidden keys."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.errors import AttnbiasError, Refused
from attnbias.steer.budget import chosen, shared_out
from attnbias.steer.rules.adatp import AdaTP, Clip
from tests.cases.hook import HookCase
from tests.cases.rule import RELATIVE, off, padded
from tests.steer.dense import rewritten
from tests.steer.models import VLMS, Subject, make
from tests.steer.test_dropping import grown

CLIPS = (Clip((0.4,), (0.9, 0.1)), Clip((0.95,), (0.2, 0.8)))  # two segments, and one
STAGES = ((1, 0.5), (2, 0.25))


def rule_of(subject: Subject, **changes: Any) -> AdaTP:
    """The image of four tokens as a video of two frames with two places each."""
    given = {"video": ("image",), "stages": STAGES, "shallow": 2, "clips": CLIPS}
    return AdaTP(**{**given, "towers": subject.towers, **changes})


def by_loops(
    rule: AdaTP, layer: int, share: float, alive: list[int], scores: Any, clip: Clip
) -> Any:
    """The tokens of one row that a stage keeps, by the words of the method. alive: 0 to 3."""
    frames, per = len(clip.relevant), 4 // len(clip.relevant)
    segments = [0]
    for value in clip.similar:
        segments.append(segments[-1] + (1 if value < rule.tau else 0))
    mean = sum(clip.relevant) / frames
    weights = []
    for number in range(segments[-1] + 1):
        own = [clip.relevant[f] for f in range(frames) if segments[f] == number]
        weight = rule.boost if sum(own) / len(own) >= mean - 1e-9 else 1.0
        weights.append(weight * len(own))
    budget = shared_out(
        round(share * 4),
        weights,
        [sum(segments[t // per] == n for t in alive) for n in range(len(weights))],
    )
    kept: list[int] = []
    for number, count in enumerate(budget):
        left = [t for t in alive if segments[t // per] == number]
        mine: list[int] = []
        while len(mine) < count:
            often = {t: sum(m % per == t % per for m in mine) for t in left}
            fewest = min(often.values()) if layer < rule.shallow else 0
            open_ = [t for t in left if layer >= rule.shallow or often[t] == fewest]
            best = max(open_, key=lambda t: (scores[t], -t))
            mine.append(best)
            left.remove(best)
        kept += mine
    return sorted(kept)


def plans(
    subject: Subject, rule: AdaTP, model: Any, inputs: dict[str, Tensor], positions: Tensor
) -> list[Any]:
    """What each row drops at each stage, from the eager model's own maps."""
    found: list[Any] = [[] for _ in range(2)]
    alive = [[0, 1, 2, 3] for _ in range(2)]
    for layer, share in rule.stages:
        maps: list[Tensor] = []
        with (
            torch.no_grad(),
            row_plans(subject, model, found, positions),
            rewritten(model, [], maps=maps),
        ):
            subject.run(model, **inputs)
        texts = maps[-len(layers_of(subject)) :]
        for row in range(2):
            asked = ((positions[row] >= 7) & (positions[row] < 16)).nonzero()[:, 0]
            seen = texts[layer - 1][row].mean(0)[asked].mean(0)
            scores = {t: float(seen[(positions[row] == 2 + t).nonzero()[0, 0]]) for t in alive[row]}
            kept = by_loops(rule, layer, share, alive[row], scores, rule.clips[row])
            found[row].append((layer, tuple(2 + t for t in alive[row] if t not in kept)))
            alive[row] = kept
    return found


def layers_of(subject: Subject) -> list[Any]:
    return [s for s in ab.hub.sites(subject.model) if s.tower == "text"]


@contextlib.contextmanager
def row_plans(subject: Subject, model: Any, plans: list[Any], positions: Tensor) -> Iterator[None]:
    """`hidden_keys` with a plan of its own for each row."""
    handles = []
    for site in layers_of(subject):
        hide = torch.zeros_like(positions, dtype=torch.bool)
        for row, plan in enumerate(plans):
            for layer, places in plan:
                for place in places if layer <= site.layer else ():
                    hide[row] |= positions[row] == place

        def before(_: Any, args: Any, kwargs: Any, hide: Tensor = hide) -> Any:
            mask = kwargs["attention_mask"]
            low = torch.finfo(mask.dtype).min
            mask = mask.expand(len(hide), -1, -1, -1).masked_fill(hide[:, None, None], low)
            return args, {**kwargs, "attention_mask": mask}

        module = model.get_submodule(site.name)
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class TestAdaTP(HookCase):
    """What a dropped token's row is afterwards nobody reads: the kept rows are compared."""

    __test__ = True
    zero: ClassVar[Any] = ((1, 1.0), (2, 1.0))
    small: ClassVar[Any] = ((1, 0.75), (2, 0.5))
    large: ClassVar[Any] = STAGES
    subjects: ClassVar[tuple[str, ...]] = VLMS
    padding: ClassVar[tuple[str, ...]] = ()  # spans move with the padding: see `test_padding`
    caches: ClassVar[tuple[str, ...]] = ()  # decided on the prompt; steps: `test_dropping`
    generates: ClassVar[tuple[str, ...]] = ()

    def rule(self, strength: Any, **where: Any) -> AdaTP:
        fields = {"video": ("image",), "shallow": 2, "clips": CLIPS[:1], "towers": ("text",)}
        return AdaTP(stages=strength, **{**fields, **where})  # type: ignore[arg-type]

    def spans(self, subject: Subject) -> dict[str, Any] | None:
        return subject.spans

    @torch.no_grad()
    @pytest.mark.parametrize("name", VLMS)
    def test_equals_the_oracle(self, name: str, request: pytest.FixtureRequest) -> None:
        """Prefill and every decode step, each row with segments and relevance of its own."""
        subject = make(name, request)
        rule, model, inputs = rule_of(subject), subject.eager(), dict(subject.inputs)
        with ab.steer(subject.model, rule, spans=subject.spans):
            found = subject.run()
            made = subject.model.generate(
                **inputs,
                max_new_tokens=4,
                do_sample=False,
                eos_token_id=None,
                output_logits=True,
                return_dict_in_generate=True,
            )
        positions = torch.arange(16).expand(2, -1)
        plan = plans(subject, rule, model, inputs, positions)
        assert [[len(places) for _, places in row] for row in plan] == [[2, 1], [2, 1]]
        with row_plans(subject, model, plan, positions):
            wanted = subject.run(model)
        for row in range(2):
            gone = {place for _, places in plan[row] for place in places}
            rows = [p for p in range(16) if p not in gone]
            assert off(found[row, rows], wanted[row, rows]) < RELATIVE
            assert off(subject.run()[row, rows], wanted[row, rows]) > 30 * RELATIVE
        for step in range(4):
            positions = torch.arange(inputs["input_ids"].shape[1]).expand(2, -1)
            with row_plans(subject, model, plan, positions):
                scores = subject.run(model, **inputs, use_cache=False)[:, -1]
            assert off(made.logits[step], scores) < RELATIVE
            inputs = grown(inputs, scores.argmax(-1))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", VLMS)
def test_padding(name: str, side: str, request: pytest.FixtureRequest) -> None:
    subject = make(name, request)
    inputs, _, rows = padded(subject, side)
    rule = rule_of(subject)
    question = [(7, 16), (7, int(inputs["attention_mask"][1].sum()))]
    spans = {**subject.spans, "question": question}
    with ab.steer(subject.model, rule, spans=spans):
        found = subject.run(**inputs)
    for row, part in enumerate(rows):
        alone = subject.row(row, part, **inputs)
        del alone["attention_mask"]
        one = rule_of(subject, clips=CLIPS[row : row + 1])
        with ab.steer(subject.model, one, spans={**spans, "question": question[row]}):
            single = subject.model(**alone).logits
        assert off(found[row, part], single[0]) < RELATIVE


@torch.no_grad()
def test_nothing_to_drop_is_the_plain_model(request: pytest.FixtureRequest) -> None:
    subject = make("qwen2_vl", request)
    plain = subject.run()
    rule = rule_of(subject, stages=((1, 1.0), (2, 1.0)))
    with ab.steer(subject.model, rule, spans=subject.spans):
        assert torch.equal(subject.run(), plain)
    with ab.steer(subject.model, rule_of(subject), spans=subject.spans):
        assert not torch.equal(subject.run(), plain)
    assert torch.equal(subject.run(), plain)


@torch.no_grad()
def test_rows_of_a_batch_do_not_touch_each_other(request: pytest.FixtureRequest) -> None:
    subject = make("llava", request)
    rule, turned = rule_of(subject), rule_of(subject, clips=CLIPS[::-1])
    with ab.steer(subject.model, rule, spans=subject.spans):
        found = subject.run()
        changed = subject.run(**subject.changed())
    with ab.steer(subject.model, turned, spans=subject.spans):
        swapped = subject.run(**subject.swapped()).flip(0)
    assert off(swapped, found) < RELATIVE
    assert off(changed[0], found[0]) < RELATIVE
    assert off(changed[1], found[1]) > 30 * RELATIVE


# The choice ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_budgets_are_exact_and_in_proportion(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0, 9, (5,), generator=generator).tolist()
    weights = (torch.rand(5, generator=generator) + 0.1).tolist()
    total = int(torch.randint(0, sum(sizes) + 1, (1,), generator=generator))
    found = shared_out(total, weights, sizes)
    assert sum(found) == total
    assert all(0 <= got <= size for got, size in zip(found, sizes, strict=True))
    open_ = [n for n in range(5) if found[n] < sizes[n]]
    # Those that are not full share what is left in proportion, to one token.
    left = sum(found[n] for n in open_)
    for n in open_:
        assert abs(found[n] - left * weights[n] / sum(weights[m] for m in open_)) < 1


def test_places_repeat_only_when_all_were_kept_once() -> None:
    scores = torch.tensor([9.0, 1.0, 8.0, 2.0, 7.0, 3.0])  # three frames of two places
    place = torch.tensor([0, 1, 0, 1, 0, 1])
    one = torch.zeros(6, dtype=torch.long)
    assert chosen(scores, one, [2]).tolist() == [0, 2]
    assert chosen(scores, one, [2], place).tolist() == [0, 5]
    assert chosen(scores, one, [4], place).tolist() == [0, 2, 3, 5]
    two = torch.tensor([0, 0, 0, 0, 1, 1])
    assert chosen(scores, two, [2, 1], place).tolist() == [0, 3, 4]
    assert chosen(torch.zeros(6), one, [3]).tolist() == [0, 1, 2]  # ties: the earlier token


def test_measure() -> None:
    """Segments start below tau; relevance is the cosine with the text."""
    a, b = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.6, 0.8, 0.0])
    frames = torch.stack([a, 2 * a, b, b])
    rule = AdaTP(tau=0.7).measure(frames, a)
    (clip,) = rule.clips
    assert clip.similar == pytest.approx((1.0, 0.6, 1.0))
    assert clip.relevant == pytest.approx((1.0, 1.0, 0.6, 0.6))
    assert rule.segments(clip) == ([0, 0, 1, 1], [2.0, 1.0])
    assert AdaTP(tau=0.6 - 1e-9).segments(clip)[0] == [0, 0, 0, 0]
    both = AdaTP().measure(torch.stack([frames, frames.flip(0)]), torch.stack([a, b]))
    assert both.clips[0] == clip
    assert len(both.clips) == 2


# What is refused ----------------------------------------------------------------------------------


def test_survives_json(tmp_path: Path) -> None:
    rule = AdaTP(video=("image",), clips=CLIPS, towers=("text",), text=None)
    recipe = ab.Recipe((rule,), "some/model", "abc123")
    recipe.save(tmp_path / "recipe.json")
    assert ab.Recipe.load(tmp_path / "recipe.json") == recipe


@torch.no_grad()
def test_refusals(request: pytest.FixtureRequest) -> None:
    subject = make("llava", request)

    def run(rule: AdaTP, **inputs: Any) -> None:
        with ab.steer(subject.model, rule, spans=subject.spans):
            subject.run(**inputs)

    with pytest.raises(Refused, match=r"rule\.measure\(frames, text\)"):
        run(rule_of(subject, clips=()))
    with pytest.raises(AttnbiasError, match="layer 14, but the model has layers 0 to 2"):
        run(rule_of(subject, stages=((1, 0.5), (14, 0.2))))
    with pytest.raises(AttnbiasError, match="not divided by 3 frames"):
        run(rule_of(subject, clips=(Clip((0.5, 0.5), (0.1, 0.2, 0.3)),)))
    with pytest.raises(Refused, match="measured 3 videos and runs 2 rows"):
        run(rule_of(subject, clips=(*CLIPS, CLIPS[0])))
    with (
        pytest.raises(Refused, match="4, 2 visual tokens"),
        ab.steer(
            subject.model,
            rule_of(subject),
            spans={**subject.spans, "image": [(2, 6), (2, 4)]},
        ),
    ):
        subject.run()
    with (
        pytest.raises(Refused, match="run the prompt in one piece"),
        ab.steer(subject.model, rule_of(subject), spans={**subject.spans, "question": (16, 20)}),
    ):
        subject.run()
    for given in (
        {"stages": ((0, 0.5),)},
        {"stages": ((1, 0.0),)},
        {"stages": ((1, 0.2), (2, 0.5))},
        {"stages": ((2, 0.5), (1, 0.2))},
        {"boost": 0.5},
        {"tau": 1.5},
    ):
        with pytest.raises(AttnbiasError, match=r"stages|AdaTP needs"):
            AdaTP(**given)
    with pytest.raises(AttnbiasError, match="needs frames"):
        AdaTP().measure(torch.zeros(2, 3), torch.zeros(4))
