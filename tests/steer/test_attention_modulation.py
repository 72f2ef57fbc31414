"""AttentionModulation beside a dense rewrite of every map."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.errors import AttnbiasError
from attnbias.steer.masses import masses
from attnbias.steer.rules.attention_modulation import AttentionModulation, Entity
from tests.cases.rule import RELATIVE, off
from tests.cases.unet import UNetCase
from tests.steer.test_diffusion import state
from tests.steer.unets import dense, inputs, unet

SPANS = {"black": (1, 2), "cat": (2, 3), "white": (4, 5), "dog": (5, 6)}
ENTITIES = (Entity("cat", ("black",)), Entity("dog", ("white",)))
PLACES = ((2, (1,)), (5, (4,)))


@pytest.fixture(scope="module")
def model() -> Any:
    return unet()


def rewrite(rule: AttentionModulation, rows: Any = (0, 1)) -> Any:
    """The method by its words, one row, head-mean and patch at a time."""

    def edit(tower: str, layer: int, scores: Tensor, timestep: Any) -> Tensor:
        steps = torch.as_tensor(timestep).reshape(-1).expand(len(scores)).tolist()
        out = []
        for row, step in enumerate(steps):
            done = 1 - (step + 1) / rule.steps
            if tower == "self":
                sharp = rule.temperature if done < rule.early else 1.0
                out.append((scores[row] / sharp).softmax(-1))
                continue
            found = scores[row].softmax(-1)
            phase = next(p for p in rule.phases if done < p[0] or p[0] == 1)
            totals = torch.stack([found[..., [n, *a]].sum(-1).mean(0) for n, a in PLACES])
            weight = torch.ones_like(found)
            for number, (noun, attributes) in enumerate(PLACES):
                weight[..., noun] *= phase[1]
                weight[..., list(attributes)] *= phase[2]
                if rule.masking:
                    other = totals.argmax(0) != number
                    for place in (noun, *attributes):
                        weight[..., place] = weight[..., place].masked_fill(other, 0.0)
            found = found * weight
            out.append(found / found.sum(-1, keepdim=True))
        return torch.stack(out)

    return edit


class TestAttentionModulation(UNetCase):
    __test__ = True
    spans = SPANS
    zero: ClassVar[Any] = {
        "temperature": 1.0,
        "masking": False,
        "phases": ((1.0, 1.0, 1.0),),
    }
    strengths: ClassVar[tuple[Any, ...]] = ({"masking": False}, {"temperature": 0.5})
    steps = (950, 650, 100)

    def rule(self, strength: dict[str, Any]) -> AttentionModulation:
        return AttentionModulation(entities=ENTITIES, **strength)

    def oracle(self, model: Any, strength: dict[str, Any], timestep: int) -> Any:
        return dense(model, rewrite(self.rule(strength)), timestep)


@torch.no_grad()
@pytest.mark.parametrize("step", [950, 650, 100])
@pytest.mark.parametrize("masking", [True, False])
def test_equals_the_dense_rewrite(model: Any, step: int, masking: bool) -> None:
    given = inputs(timestep=step)
    rule = AttentionModulation(entities=ENTITIES, masking=masking, temperature=0.5)
    plain = model(**given).sample
    with ab.steer(model, rule, spans=SPANS):
        found = model(**given).sample
    with dense(model, rewrite(rule), step):
        wanted = model(**given).sample
    assert off(found, wanted) < RELATIVE
    assert off(plain, wanted) > 30 * RELATIVE
    with dense(model, rewrite(rule), {950: 650, 650: 100, 100: 950}[step]):
        assert off(found, model(**given).sample) > 30 * RELATIVE  # another phase would be seen


@torch.no_grad()
def test_rows_at_steps_of_their_own(model: Any) -> None:
    given = {**inputs(), "timestep": torch.tensor([950, 100])}
    rule = AttentionModulation(entities=ENTITIES)
    with ab.steer(model, rule, spans=SPANS):
        found = model(**given).sample
        for row, step in enumerate((950, 100)):
            one = {n: v[row : row + 1] for n, v in given.items()}
            one["timestep"] = torch.tensor(step)
            assert off(model(**one).sample[0], found[row]) < RELATIVE
    with dense(model, rewrite(rule), [950, 100]):
        assert off(found, model(**given).sample) < RELATIVE


@torch.no_grad()
def test_zero_strength_is_the_plain_model(model: Any) -> None:
    given = inputs(timestep=950)
    plain = model(**given).sample
    rule = AttentionModulation(
        entities=ENTITIES, temperature=1.0, masking=False, phases=((1.0, 1.0, 1.0),)
    )
    with ab.steer(model, rule, spans=SPANS):
        assert torch.equal(model(**given).sample, plain)


@torch.no_grad()
def test_masks_are_exact_and_rows_keep_their_total(model: Any) -> None:
    """Words of other entities get exactly nothing; everything together is still one."""
    rule = AttentionModulation(entities=ENTITIES)
    names = {**SPANS, "rest": (0, 1), "and": (3, 4), "end": (6, 7)}
    with ab.steer(model, rule, spans=SPANS), masses(model, names, towers=("cross",)) as seen:
        model(**inputs(timestep=950))
    for found in seen.values():
        cat, dog = found["black"] + found["cat"], found["white"] + found["dog"]
        assert bool(((cat == 0) ^ (dog == 0)).all())
        assert bool((cat == 0).any())
        assert bool((dog == 0).any())
        total = torch.stack(list(found.values())).sum(0)
        assert float((total - 1).abs().max()) < 1e-5
        # One owner per patch, the same for all heads.
        assert bool(((cat == 0) == (cat == 0)[:, :1]).all())


@torch.no_grad()
def test_restores(model: Any) -> None:
    before, given = state(model), inputs(timestep=950)
    plain = model(**given).sample
    with ab.steer(model, AttentionModulation(entities=ENTITIES), spans=SPANS):
        assert not torch.equal(model(**given).sample, plain)
    assert state(model) == before
    assert torch.equal(model(**given).sample, plain)


def test_refusals_and_json(tmp_path: Path, model: Any, request: pytest.FixtureRequest) -> None:
    rule = AttentionModulation(entities=ENTITIES)
    recipe = ab.Recipe((rule,), "some/model", "abc123")
    recipe.save(tmp_path / "recipe.json")
    assert ab.Recipe.load(tmp_path / "recipe.json") == recipe
    with (
        torch.no_grad(),
        pytest.raises(AttnbiasError, match="'dog' shares tokens"),
        ab.steer(model, rule, spans={**SPANS, "dog": (2, 3)}),
    ):
        model(**inputs())
    with pytest.raises(AttnbiasError, match="needs the span"), ab.steer(model, rule):
        pass
    for given in (
        {"entities": ()},
        {"entities": ("cat",)},
        {"entities": ENTITIES, "temperature": 0.0},
        {"entities": ENTITIES, "early": 2.0},
        {"entities": ENTITIES, "phases": ((0.5, 1.0, 1.0),)},
        {"entities": ENTITIES, "phases": ((1.0, -1.0, 1.0),)},
        {"entities": ENTITIES, "steps": 0},
    ):
        with pytest.raises(AttnbiasError, match=r"must|ends"):
            AttentionModulation(**given)


@torch.no_grad()
def test_a_model_without_steps_is_told_so(request: pytest.FixtureRequest) -> None:
    from tests.steer.models import make

    subject = make("bart cross", request)
    rule = AttentionModulation(entities=(Entity("cat"),), towers=("cross",))
    with (
        pytest.raises(AttnbiasError, match="timestep of a diffusion model"),
        ab.steer(subject.model, rule, spans={"cat": (2, 3)}),
    ):
        subject.run()
