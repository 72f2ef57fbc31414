"""Models as people load them: spread over devices, in half precision, in 4 bits, with adapters.

The other route is always the eager attention of the model's own file with its map rewritten, on
the same loaded model: what is loaded otherwise computes otherwise, but steers alike.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnbias as ab
from tests.cases.rule import RELATIVE, off
from tests.steer.dense import DenseEdit, Map, multiply, rewritten
from tests.steer.models import MAKERS, NAMES, VISION, Subject, make, redraw, sharpen, tokens

KEYS, FACTOR = (0, 3, 4), 4.0


def chosen(found: Map) -> Tensor:
    return torch.isin(found.positions, torch.tensor(KEYS))


def shift(subject: Subject | None = None, factor: float = FACTOR) -> ab.steer.Rule:
    towers = None if subject is None else subject.towers
    return ab.rules.KeyShift(keys=list(KEYS), factor=factor, heads="all", towers=towers)


@contextmanager
def eagerly(model: nn.Module, subject: Subject, factor: float = FACTOR) -> Iterator[None]:
    """`model` itself, for the length of the block, by its eager attention and dense edits."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    edit = DenseEdit(multiply(chosen, factor), towers=subject.towers)
    try:
        with rewritten(model, [edit], lambda count: torch.arange(count)[None]):
            yield
    finally:
        model.set_attn_implementation(before)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Subject]:
    """A decoder in a folder, and the same one in memory."""
    subject = MAKERS["mistral"]()
    subject.model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", subject


def hooks(model: nn.Module) -> dict[str, Any]:
    return {
        name: (
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            id(vars(module).get("forward")),
        )
        for name, module in model.named_modules()
    }


SPREAD = {
    "one device": {"": "cpu"},
    "layers on disk": {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    },
    "all on disk": {"": "disk"},
}


@pytest.mark.parametrize("how", [*SPREAD, "offloaded to memory", "offloaded to disk"])
@torch.no_grad()
def test_device_map(how: str, saved: tuple[Path, Subject], tmp_path: Path) -> None:
    """Weights that come from memory or disk layer by layer: as the model that is all there."""
    import accelerate

    folder, subject = saved
    with ab.steer(subject.model, shift()):
        wanted = subject.run()
        text = subject.model.generate(**subject.inputs, max_new_tokens=4, do_sample=False)
    plain = subject.run()
    if how in SPREAD:
        model = type(subject.model).from_pretrained(
            folder, device_map=SPREAD[how], offload_folder=str(tmp_path / "offload")
        )
    else:
        model = copy.deepcopy(subject.model)
        offload = accelerate.cpu_offload
        options: dict[str, Any] = {"execution_device": torch.device("cpu")}
        if how == "offloaded to disk":
            offload, options["offload_dir"] = accelerate.disk_offload, str(tmp_path / "weights")
        offload(model, **options)
    spread = {parameter.device.type for parameter in model.parameters()}
    assert ("meta" in spread) == (how != "one device")
    before = hooks(model)
    with ab.steer(model, shift()):
        found = subject.run(model)
        assert torch.equal(
            model.generate(**subject.inputs, max_new_tokens=4, do_sample=False), text
        )
    assert torch.equal(found, wanted)
    assert off(plain, wanted) > 30 * RELATIVE
    assert torch.equal(subject.run(model), plain)
    assert hooks(model) == before
    assert ab.support(model).supported  # its default inputs know where the model runs


HALVES = {torch.bfloat16: 0.1, torch.float16: 0.02}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", [*NAMES, *VISION])
@torch.no_grad()
def test_half_precision(name: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    """No further from a float64 map than the plain model of that precision is."""
    subject = make(name, request)
    model = subject.model.to(dtype)
    for key, value in subject.inputs.items():
        subject.inputs[key] = value.to(dtype) if value.is_floating_point() else value
    plain = subject.run()
    with ab.steer(model, shift(subject, 1.0)):
        assert torch.equal(subject.run(), plain)
    with ab.steer(model, shift(subject)):
        found = subject.run()
    assert found.dtype == dtype
    with eagerly(model, subject):
        wanted = subject.run()
    with eagerly(model, subject, 1.0):
        still = subject.run()
    rounding = off(plain.float(), still.float())
    assert off(found.float(), wanted.float()) < max(3 * rounding, HALVES[dtype] / 4)
    assert off(plain.float(), wanted.float()) > HALVES[dtype]
    assert torch.equal(subject.run(), plain)


@torch.no_grad()
def test_autocast() -> None:
    subject = MAKERS["mistral"]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = subject.run()
        with ab.steer(subject.model, shift(factor=1.0)):
            assert torch.equal(subject.run(), plain)
        with ab.steer(subject.model, shift()):
            found = subject.run()
        with eagerly(subject.model, subject):
            wanted = subject.run()
        with eagerly(subject.model, subject, 1.0):
            still = subject.run()
    rounding = off(plain.float(), still.float())
    assert off(found.float(), wanted.float()) < max(3 * rounding, 0.02)
    assert off(plain.float(), wanted.float()) > 0.1


@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_quantised(bits: int, saved: tuple[Path, Subject]) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("4-bit weights: bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig, MistralConfig, MistralForCausalLM

    # The kernels take matrices whose sides are multiples of 32.
    wide = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    config = MistralConfig(**{**saved[1].model.config.to_dict(), **wide})
    folder = saved[0].with_name("wide")
    sharpen(redraw(MistralForCausalLM(config)), 5.0).save_pretrained(folder)
    given = {f"load_in_{bits}bit": True}
    if bits == 4:
        given["bnb_4bit_compute_dtype"] = torch.float32
    model = MistralForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**given), device_map={"": "cpu"}
    )
    kind = type(model.model.layers[0].self_attn.q_proj).__name__
    assert kind == {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    subject = Subject("wide", model, {"input_ids": tokens()}, None, True, True)
    plain = subject.run()
    with ab.steer(model, shift()):
        found = subject.run()
        text = model.generate(**subject.inputs, max_new_tokens=3, do_sample=False)
    with eagerly(model, subject):
        wanted = subject.run()
    size = off(plain, wanted)
    assert off(found, wanted) < 0.05 * size
    assert size > 1e-4
    assert text.shape == (2, 16)
    assert torch.equal(subject.run(), plain)


@torch.no_grad()
def test_adapters() -> None:
    """LoRA on the queries: active, disabled, another one chosen, merged; inside a context too."""
    import peft

    subject = MAKERS["mistral"]()
    base = subject.run()
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(subject.model), lora).eval()
    model.add_adapter("second", lora)
    inner = model.get_base_model()
    active = subject.run(model)
    with ab.steer(subject.model, shift()):
        base_steered = subject.run()
    with eagerly(inner, subject):
        wanted = subject.run(model)
    with ab.steer(model, shift()):
        assert off(subject.run(model), wanted) < RELATIVE
        with model.disable_adapter():
            assert torch.equal(subject.run(model), base_steered)
        assert off(subject.run(model), wanted) < RELATIVE
        model.set_adapter("second")
        other = subject.run(model)
        model.set_adapter("default")
    with model.disable_adapter(), ab.steer(model, shift()):
        assert torch.equal(subject.run(model), base_steered)
    assert torch.equal(subject.run(model), active)
    for one, two in ((active, base), (active, wanted), (other, wanted), (base_steered, base)):
        assert off(one, two) > 30 * RELATIVE
    with ab.steer(model, shift()):
        model.merge_adapter()  # in place, while the context is open
        assert off(subject.run(model), wanted) < RELATIVE
        model.unmerge_adapter()
        assert off(subject.run(model), wanted) < RELATIVE
    with ab.steer(model.merge_and_unload(), shift()):
        assert off(subject.run(inner), wanted) < RELATIVE


@torch.no_grad()
def test_the_adapter_of_the_model_itself() -> None:
    """``model.add_adapter`` puts LoRA layers into the model without a wrapper."""
    import peft

    subject = MAKERS["mistral"]()
    base = subject.run()
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    subject.model.add_adapter(lora)
    active = subject.run()
    with ab.steer(subject.model, shift()):
        found = subject.run()
        subject.model.disable_adapters()
        without = subject.run()
    with eagerly(subject.model, subject):
        assert off(without, subject.run()) < RELATIVE
        subject.model.enable_adapters()
        assert off(found, subject.run()) < RELATIVE
    assert torch.equal(subject.run(), active)
    assert off(active, base) > 30 * RELATIVE
    assert off(without, found) > 30 * RELATIVE


class Texts(torch.utils.data.Dataset):
    """A few rows of tokens with their labels."""

    def __init__(self, rows: int = 5) -> None:
        self.ids = tokens(rows, 9, seed=4)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def trainer(model: nn.Module, folder: Path, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_eval_batch_size=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    return Trainer(model=model, args=arguments, train_dataset=Texts(), eval_dataset=Texts())


def test_evaluation_by_a_trainer(tmp_path: Path) -> None:
    """``trainer.evaluate()`` and ``predict`` inside a context: the loss of the edited model."""
    subject = MAKERS["mistral"]()
    found = trainer(subject.model, tmp_path)
    data = Texts()

    def loss() -> float:
        with torch.no_grad():
            parts = [data.ids[:2], data.ids[2:4], data.ids[4:]]
            losses = [len(ids) * float(subject.model(ids, labels=ids).loss) for ids in parts]
        return sum(losses) / len(data)

    plain = loss()
    assert found.evaluate()["eval_loss"] == pytest.approx(plain, rel=1e-5)
    with ab.steer(subject.model, shift()):
        steered = found.evaluate()["eval_loss"]
        scores = torch.tensor(found.predict(data).predictions)
    with eagerly(subject.model, subject):
        assert steered == pytest.approx(loss(), rel=1e-5)
        with torch.no_grad():
            assert off(scores, subject.model(data.ids).logits) < RELATIVE
    assert abs(steered - plain) > 3e-4 * plain
    assert loss() == plain


def test_training_by_a_trainer(tmp_path: Path) -> None:
    """A step with evaluation in it, inside a context, teaches what the edited model computes."""
    models = [MAKERS["mistral"]() for _ in range(3)]
    options = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no"}
    learned = []
    for number, subject in enumerate(models):
        made = trainer(subject.model, tmp_path, seed=3, learning_rate=0.01, **options)
        if number == 0:
            with ab.steer(subject.model, shift()):
                made.train()
        elif number == 1:
            with eagerly(subject.model, subject):
                made.train()
        else:
            made.train()
        learned.append(subject.model.model.layers[1].self_attn.q_proj.weight.detach())
    assert off(learned[0], learned[1]) < 1e-3
    assert off(learned[2], learned[1]) > 3e-3


@pytest.mark.parametrize("name", VISION)
@torch.no_grad()
def test_images_into_models_that_are_offloaded_and_adapted(name: str, tmp_path: Path) -> None:
    import accelerate
    import peft

    subject = MAKERS[name]()
    plain = subject.run()
    with ab.steer(subject.model, shift(subject)):
        wanted = subject.run()
    assert off(plain, wanted) > 30 * RELATIVE
    if name != "gemma3":  # whose plain forward does not run offloaded
        cpu, model = torch.device("cpu"), copy.deepcopy(subject.model)
        accelerate.disk_offload(model, offload_dir=str(tmp_path / "weights"), execution_device=cpu)
        with ab.steer(model, shift(subject)):
            assert torch.equal(subject.run(model), wanted)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(subject.model, config).eval()
    inner = model.get_base_model()
    with ab.steer(model, shift(subject)):
        found = subject.run(model)
    with eagerly(inner, subject):
        assert off(found, subject.run(model)) < RELATIVE
    assert off(found, wanted) > 30 * RELATIVE
