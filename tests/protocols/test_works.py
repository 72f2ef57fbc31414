"""Every protocol runs, on a tiny model of its kind: three arms, a rule that does something."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import attnbias as ab
from attnbias.protocols import KINDS, PROTOCOLS, protocol, read, reproduce
from tests.hub import processors
from tests.steer import models

TEXT = [name for name, one in PROTOCOLS.items() if KINDS[one.kind].loads == "text"]
SEEING = [name for name, one in PROTOCOLS.items() if KINDS[one.kind].loads == "image-text"]
VISION = [name for name, one in PROTOCOLS.items() if KINDS[one.kind].loads == "vision"]
MEASURED = 3  # items beside those that a rule is fitted on

R = ab.rules
# What a user fits elsewhere, or what the published numbers of a large model are on a tiny one.
RECIPES: dict[str, Callable[[], Any]] = {
    "circuit-reuse": lambda: R.HardPattern(
        keys=("wrong 0", "wrong 1"), heads=[(1, 0), (2, 3), (3, 1), (4, 2)]
    ),
    "lookback-lens": lambda: R.LookbackLens(
        heads="all", context=("gold",), chunk=4, count=3, detector=detector()
    ),
    "game": lambda: R.GAME(
        heads="all", context=("gold",), chunk=4, threshold=0.9, step=1.0, detector=detector()
    ),
    "vti-latent-steering": lambda: R.VTI(directions=steps(32, 3), strength=9.0, towers=("text",)),
    "persona-vectors": lambda: R.PersonaVector(directions=steps(64, 5), tokens_at="all"),
    # Sink dimensions of a model without sinks: tokens that are large in two.
    "visual-attention-sink-var": lambda: R.VAR(
        dims=(0, 1), tau=1.0, summ=0.0, rho=1.0, start=0, heads="all", towers=("text",)
    ),
}  # fmt: skip


def detector() -> Any:
    places = tuple((layer, head) for layer in range(5) for head in range(8))
    weights = torch.randn(40, generator=torch.Generator().manual_seed(0)).tolist()
    return R.Detector(places=places, weights=tuple(weights), intercept=0.1)


def steps(size: int, layers: int) -> dict[int, list[float]]:
    gen = torch.Generator().manual_seed(0)
    return {n: torch.randn(size, generator=gen).tolist() for n in range(layers)}


def line(kind: str, n: int) -> dict[str, Any]:
    """An item of a kind; every third number has other words."""
    animal = ("dog", "cat", "bird")[n % 3]
    documents = [
        "The sun was big and hot.",
        f"Tom saw a red {animal} in the park.",
        "Lily had a toy.",
    ]
    text = {"documents": documents, "gold": 1, "system": "Tell a story."}
    item: dict[str, Any] = {
        "answers": {**text, "question": "What did Tom see? Tom saw a red", "answers": [animal]},
        "choices": {
            **text,
            "question": "red and blue. Tom saw a",
            "choices": [f" {animal}", " big toy"],
            "answer": n % 2,
            "marks": {"wrong 0": "red", "wrong 1": "blue"},
        },
        "texts": {"text": "Once upon a time there was a dog. " * 6 + animal},
        "captions": {
            "image": f"{n}.png",
            "question": "what is in the picture",
            "objects": ["dog"],
            "vocabulary": ["dog", "cat", "mat", "red"],
        },
        "image choices": {
            "image": f"{n}.png",
            "question": "what is in the picture",
            "documents": ["a red dog sits on a mat"],
            "choices": ["dog", "blue cat"],
            "answer": n % 2,
        },
        "images": {"image": f"{n}.png", "label": n % 7},
    }[kind]  # fmt: skip
    return item


def run(name: str, model: Any, processor: Any, folder: Path) -> dict[str, Any]:
    """The protocol on a file of items, with a recipe where the rule is fitted elsewhere."""
    one = protocol(name)
    one = replace(one, fit=min(one.fit, 8))  # for time
    kind = KINDS[one.kind]
    rules = (RECIPES[name](),) if name in RECIPES else ()
    count = MEASURED + (0 if rules else one.fit)
    for number in range(count if kind.loads != "text" else 0):
        processors.picture(number).save(folder / f"{number}.png")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(line(one.kind, n)) + "\n" for n in range(count)))
    items = read(data, kind.fields, kind.example)
    return reproduce(
        one,
        model,
        processor,
        items,
        name="tiny",
        rules=one.check(rules) if rules else (),
        new_tokens=6,
    )


def check(name: str, found: dict[str, Any]) -> None:
    """Three arms for each item; the rule and the control were in force and are not the same."""
    one = protocol(name)
    assert len(found["rows"]) == 3 * MEASURED
    assert found["rules"] != found["control rules"]
    assert {rule["rule"] for rule in found["rules"]} >= set(one.needs)
    assert found["mark"] == "measured"
    assert set(found["arms"]) == {"plain", "rule", "control"}
    assert one.score in found["arms"]["rule"]
    json.dumps(found, allow_nan=False)


@pytest.fixture(scope="module")
def reader(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = request.getfixturevalue("stories")
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(
        folder
    )


@pytest.mark.parametrize("name", TEXT)
def test_works_of_text(name: str, reader: tuple[Any, Any], tmp_path: Path) -> None:
    before = {key: value.clone() for key, value in reader[0].state_dict().items()}
    check(name, run(name, *reader, tmp_path))
    assert all(torch.equal(value, before[key]) for key, value in reader[0].state_dict().items())


@pytest.mark.parametrize("name", SEEING)
def test_works_of_images_and_text(name: str, tmp_path: Path) -> None:
    processor = processors.processor("llava")
    model: Any = models.llava().model
    model.config.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    check(name, run(name, model, processor, tmp_path))


@pytest.mark.parametrize("name", VISION)
def test_works_of_images(name: str, tmp_path: Path) -> None:
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    model: Any = models.dinov2().model
    with torch.no_grad():
        mlp = model.dinov2.encoder.layer[1].mlp  # one neuron that makes outliers
        mlp.fc2.weight[:, 5] *= 200
    found = run(name, model, processor, tmp_path)
    assert found["arms"]["rule"]["outlier"]["mean"] < found["arms"]["plain"]["outlier"]["mean"] / 2
    assert found["gain"]["over control"]["mean"] > 0
    check(name, found)
    assert {"outlier", "accuracy"} <= found["arms"]["rule"].keys()


@pytest.mark.parametrize(
    "name", ["lookback-lens", "game", "vti-latent-steering", "persona-vectors"]
)
def test_rules_fitted_elsewhere_say_how(name: str, reader: tuple[Any, Any], tmp_path: Path) -> None:
    one = protocol(name)
    with pytest.raises(ab.errors.Refused, match=r"--recipe r\.json"):
        one.rule(None)  # type: ignore[arg-type]


def test_controls_are_of_the_same_size(reader: tuple[Any, Any], tmp_path: Path) -> None:
    found = run("circuit-reuse", *reader, tmp_path)
    own, other = (found[key][0]["heads"] for key in ("rules", "control rules"))
    assert sorted(layer for layer, _ in own) == sorted(layer for layer, _ in other)
    assert not {tuple(pair) for pair in own} & {tuple(pair) for pair in other}
    found = run("persona-vectors", *reader, tmp_path)
    own, other = (found[key][0]["directions"] for key in ("rules", "control rules"))
    for a, b in zip(own, other, strict=True):
        assert a["vectors"] != b["vectors"]
        assert sorted(a["vectors"][0]) == sorted(b["vectors"][0])
