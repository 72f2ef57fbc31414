from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnbias as ab
from tests.cases.hook import HookCase
from tests.cases.rule import RELATIVE, off, padded
from tests.steer.models import MAKERS, Subject, make
from tests.steer.test_vti import MLPS, blocks, drawn, width

Persona, Response = ab.rules.PersonaVector, ab.rules.Response


@contextlib.contextmanager
def by_hooks(model: nn.Module, name: str, rule: Any) -> Iterator[None]:
    """The sum after the block, on every token, by plain hooks."""
    handles = []
    for one in rule.directions:
        vector = rule.strength * torch.tensor(one.vectors[0])

        def after(m: Any, a: Any, out: Any, vector: Tensor = vector) -> Any:
            return (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector

        handles.append(blocks(model, name)[one.layer].register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class TestPersonaVector(HookCase):
    __test__ = True
    zero, small, large = 0.0, 0.1, 1.0
    subjects = tuple(MLPS)
    padding = ("stories", "minilm", "llava")
    generates = ("stories", "qwen2_vl")
    size = 32

    def each(self, name: str, request: pytest.FixtureRequest) -> Subject:
        subject = super().each(name, request)
        self.size = width(subject)
        return subject

    def rule(self, strength: float, **where: Any) -> Any:
        return ab.rules.PersonaVector(
            directions={1: drawn(self.size, 1)}, strength=strength, tokens_at="all", **where
        )

    def oracle(
        self, subject: Subject, strength: float, model: Any
    ) -> contextlib.AbstractContextManager[Any]:
        self.size = width(subject)
        return by_hooks(model, subject.name, self.rule(strength))


# Which tokens -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("tokens_at", ["response", "prompt"])
@pytest.mark.parametrize("side", ["left", "right", None])
def test_tokens_of_prompt_and_response(
    tokens_at: Any, side: Any, request: pytest.FixtureRequest
) -> None:
    """Greedy decoding beside a loop of hooks that edits the same positions; any padding."""
    subject = make("stories", request)
    vector = torch.tensor(drawn(64, 1))
    rule = Persona(directions={1: vector}, strength=0.5, tokens_at=tokens_at)
    inputs = dict(subject.inputs) if side is None else padded(subject, side)[0]
    inputs.pop("position_ids", None)
    keep = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    block = subject.model.get_submodule("model.layers.1")
    seen: list[Tensor] = []

    def edited(out: Tensor) -> Tensor:
        new = out.clone()
        for row in range(2):
            if out.shape[1] == 1:
                if tokens_at == "response":
                    new[row] = out[row] + 0.5 * vector
            else:
                last = int(keep[row].nonzero()[-1])
                if tokens_at == "response":
                    new[row, last] = out[row, last] + 0.5 * vector
                else:
                    new[row] = out[row] + 0.5 * vector
        return new

    model = subject.eager()
    other = model.get_submodule("model.layers.1")
    handle = other.register_forward_hook(lambda m, a, o: edited(o))
    options: Any = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    options |= {"eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}
    wanted = model.generate(**inputs, **options)  # type: ignore[operator]
    handle.remove()
    with ab.steer(subject.model, rule):
        keeper = block.register_forward_hook(lambda m, a, o: seen.append(o.clone()))
        found = subject.model.generate(**inputs, **options)  # type: ignore[operator]
        keeper.remove()
    assert torch.equal(found.sequences, wanted.sequences)
    assert off(torch.stack(found.logits), torch.stack(wanted.logits)) < RELATIVE
    plain = subject.model.generate(**inputs, **options)  # type: ignore[operator]
    assert off(torch.stack(found.logits), torch.stack(plain.logits)) > 1e-3
    assert len(seen) == 6


# Finding and watching -----------------------------------------------------------------------------


def answers(model: Any, seed: int, count: int = 4) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        ids = torch.randint(3, 400, (1, 8 + number), generator=generator)
        found.append(Response({"input_ids": ids}, 4))
    return found


@torch.no_grad()
def test_fit_is_the_difference_of_means(request: pytest.FixtureRequest) -> None:
    """Per answer over its own tokens, then over answers: beside recorded hidden states."""
    model: Any = make("stories", request).model
    one, two = answers(model, 1), answers(model, 2, 3)
    rule = Persona(layers=(0, 2)).fit(model, one, two, progress=False)
    assert [d.layer for d in rule.directions or ()] == [0, 2]
    for direction in rule.directions or ():
        means = []
        for group in (one, two):
            states = [
                model(**answer.inputs, output_hidden_states=True).hidden_states[direction.layer + 1]
                for answer in group
            ]
            means.append(torch.stack([state[0, 4:].mean(0) for state in states]).mean(0))
        assert off(torch.tensor(direction.vectors[0]), means[0] - means[1]) < 1e-4
    with ab.steer(model, rule):
        model(**one[0].inputs)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_enter_a_fit_or_a_watch(side: str, request: pytest.FixtureRequest) -> None:
    subject = make("stories", request)
    model: Any = subject.model
    inputs, _, rows = padded(subject, side)
    row = {name: value[1:] for name, value in inputs.items()}
    alone = {"input_ids": inputs["input_ids"][1:, rows[1]]}
    rules = [
        Persona(layers=(1,)).fit(
            model,
            [Response(given, 3)],
            [Response({"input_ids": alone["input_ids"] + 5}, 3)],
            progress=False,
        )
        for given in (row, alone)
    ]
    vectors = [torch.tensor(rule.directions[0].vectors[0]) for rule in rules]  # type: ignore[index]
    assert off(vectors[0], vectors[1]) < 1e-4
    whole = rules[1].monitor(model, inputs)[1]
    single = rules[1].monitor(model, alone)[1]
    assert whole.shape == (2,)
    assert off(whole[1:], single) < 1e-4
    states = model(**alone, output_hidden_states=True).hidden_states[2]
    unit = vectors[1] / vectors[1].norm()
    assert off(single, states[:, -1] @ unit) < 1e-4
    mean = rules[1].projection(model, Response(alone, 3))[1]
    assert mean == pytest.approx(float((states[0, 3:] @ unit).mean()), rel=1e-4)


@torch.no_grad()
def test_steering_moves_what_is_watched(request: pytest.FixtureRequest) -> None:
    """The projection after the layer rises by exactly the strength times the vector's length."""
    subject = make("stories", request)
    model: Any = subject.model
    rule = Persona(layers=(2,)).fit(model, answers(model, 1), answers(model, 2), progress=False)
    vector = torch.tensor(rule.directions[0].vectors[0])  # type: ignore[index]
    before = rule.monitor(model, subject.inputs)[2]
    for strength in (-2.0, 0.5, 3.0):
        steered = Persona(directions=rule.directions, strength=strength)
        with ab.steer(model, steered):
            after = rule.monitor(model, subject.inputs)[2]
        assert off(after - before, strength * vector.norm().expand(2)) < 1e-4


def test_a_fitted_rule_survives_a_recipe(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model: Any = make("stories", request).model
    rule = Persona(layers=(1,)).fit(model, answers(model, 1), answers(model, 2), progress=False)
    recipe = ab.Recipe.of(model, rule)
    recipe.save(tmp_path / "recipe.json")
    assert ab.Recipe.load(tmp_path / "recipe.json") == recipe


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"strength": float("nan")}, "strength must be"),
        ({"tokens_at": "answer"}, "tokens_at must be"),
        ({"heads": [0]}, "heads stays 'all'"),
        ({"directions": {0: []}}, "directions must go from"),
    ],
)
def test_bad_fields(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ab.AttnbiasError, match=words):
        Persona(**fields)


def test_unfitted_is_refused_with_the_line_to_run(request: pytest.FixtureRequest) -> None:
    subject = make("stories", request)
    words = r"\.fit\(model, with_trait, without_trait\)"
    with pytest.raises(ab.Refused, match=words), ab.steer(subject.model, Persona()):
        pass
    with pytest.raises(ab.Refused, match=words):
        Persona().monitor(subject.model, subject.inputs)


def test_fit_refuses_in_one_sentence(request: pytest.FixtureRequest) -> None:
    model: Any = make("stories", request).model
    good = answers(model, 1)
    two_rows = Response({"input_ids": torch.ones(2, 5, dtype=torch.long)}, 1)
    for with_trait, without, words in (
        ([], good, "with_trait must hold answers"),
        (good, [{"input_ids": 1}], "without_trait must hold answers"),
        ([Response(good[0].inputs, 99)], good, "start=99"),
        ([two_rows], good, "got 2 rows"),
    ):
        with pytest.raises(ab.AttnbiasError, match=words) as caught:
            Persona().fit(model, with_trait, without, progress=False)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    vlm = MAKERS["qwen2_vl"]()
    with (
        pytest.raises(ab.Refused, match="names no tower"),
        ab.steer(vlm.model, Persona(directions={0: [1.0] * 32})),
    ):
        pass
