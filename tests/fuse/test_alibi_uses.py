"""What people do with models of ALiBi and sinks: caches, beams, parts of a prompt, small calls."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnbias as ab
from attnbias.errors import Refused
from attnbias.fuse import modes
from tests.cases.fuse_parts import Padded
from tests.fuse.test_bloom import TestBloom as Bloom
from tests.fuse.test_falcon import TestFalcon as Falcon
from tests.fuse.test_falcon import TestFalconEager as FalconEager
from tests.fuse.test_falcon import TestFalconOfOneKeyHead as FalconOfOneKeyHead
from tests.fuse.test_gpt_oss import TestGptOss as GptOss
from tests.fuse.test_gpt_oss import TestMiMo as MiMo
from tests.fuse.test_mpt import TestMpt as Mpt

CASES: dict[str, type[Padded]] = {
    "mpt": Mpt,
    "bloom": Bloom,
    "falcon": Falcon,
    "falcon eager": FalconEager,
    "falcon of one key head": FalconOfOneKeyHead,
    "gpt-oss": GptOss,
    "mimo": MiMo,
}
KINDS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "without cache": {"use_cache": False},
    "sampled": {"do_sample": True},
    "padded": {},
    "static": {"cache_implementation": "static"},
}
# Stock Bloom and Falcon refuse a static cache beside a mask by themselves.
STATIC = ("mpt", "gpt-oss")
WAYS = [
    (name, kind)
    for name in ("mpt", "bloom", "falcon", "gpt-oss")
    for kind in KINDS
    if kind != "static" or name in STATIC
]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("length", [1, 2, 17, 60])
def test_small_calls(name: str, length: int) -> None:
    """What is too small for the planner is computed at once, with the numbers of stock."""
    case = CASES[name]()
    model = case.model()
    given, real = case.padded(length) if length > 2 else (case.inputs(2, length), None)
    wanted = case.run(model, given, None)
    with ab.fuse(model, quiet=True, measure=False) as fused, modes.recording() as seen:
        found = case.run(model, given, None)
    assert [one for _, one in seen] == ["direct"] * fused.replaced
    if real is not None:
        found, wanted = found[real], wanted[real]
    assert case.off(found, wanted) <= case.tolerance


@pytest.mark.parametrize("name", ["mpt", "bloom", "falcon", "gpt-oss"])
def test_small_gradients(name: str) -> None:
    case: Any = CASES[name]()
    model = case.model(**dict.fromkeys(case.dropout_names, 0.0)).train()
    given, real = case.padded(17)
    grads = []
    for fused in (False, True):
        model.zero_grad()
        whole = ab.fuse(model, quiet=True, measure=False) if fused else None
        case.output(model(**given))[real].square().sum().backward()
        if whole is not None:
            whole.undo()
        grads.append({k: v.grad for k, v in model.named_parameters() if v.grad is not None})
    largest = max(float(one.abs().max()) for one in grads[0].values())
    for key, one in grads[0].items():
        scale = max(float(one.abs().max()), 1e-4 * largest)
        assert float((grads[1][key] - one).abs().max()) <= 1e-4 * scale, key


@pytest.mark.parametrize(("name", "kind"), WAYS)
def test_ways_to_generate(name: str, kind: str) -> None:
    case = CASES[name]()
    model: Any = case.model()
    given, _ = case.padded(33)
    if kind != "padded":
        given.pop("attention_mask")
    more = {"min_new_tokens": 16, "max_new_tokens": 16, "no_repeat_ngram_size": 2}
    more |= {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}

    def generate() -> Any:
        torch.manual_seed(4)
        return model.generate(**given, **{**more, **KINDS[kind]})

    wanted = generate()
    for route in ("fused", None):
        with ab.fuse(model, quiet=True, measure=False), modes.taking(route):
            found = generate()
        assert torch.equal(found.sequences, wanted.sequences)
        for one, other in zip(found.logits, wanted.logits, strict=True):
            assert case.off(one, other) <= 1e-4


@pytest.mark.parametrize("name", ["mpt", "bloom", "falcon", "gpt-oss"])
@pytest.mark.parametrize("route", ["fused", None])
def test_a_prompt_in_parts(name: str, route: Any) -> None:
    """Several tokens after a cache: the causal mask has an offset, the second row is padded."""
    case = CASES[name]()
    model: Any = case.model()
    given, real = case.padded(40)
    tokens, keep = given["input_ids"], given["attention_mask"]

    def parts() -> Tensor:
        cache, outs = None, []
        for start, stop in ((0, 21), (21, 39), (39, 40)):
            with torch.no_grad(), modes.taking(route):
                found = model(
                    input_ids=tokens[:, start:stop], attention_mask=keep[:, :stop],
                    past_key_values=cache, use_cache=True,
                )  # fmt: skip
            cache = found.past_key_values
            outs.append(found.logits)
        return torch.cat(outs, 1)

    wanted = parts()
    with ab.fuse(model, quiet=True, measure=False):
        found = parts()
    assert case.off(found[real], wanted[real]) <= case.tolerance


@pytest.mark.parametrize("name", ["mpt", "bloom", "falcon", "gpt-oss"])
@pytest.mark.parametrize("training", [False, True])
def test_no_matrix_of_scores_is_made(name: str, training: bool) -> None:
    """Neither a mask nor scores of N x N numbers, for any head, with padding."""
    case = CASES[name]()
    model = case.model(max_seq_len=512) if name == "mpt" else case.model()
    model.requires_grad_(training)
    given, _ = case.padded(400)
    with ab.fuse(model, quiet=True, measure=False):
        largest = _largest(model, given, training)
    assert largest < 400 * 400
    assert _largest(model, given, training) >= 2 * 400 * 400


def _largest(model: nn.Module, given: dict[str, Tensor], training: bool) -> int:
    """Numbers of the largest tensor that an operator of PyTorch returns in a pass."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        largest: int = 0

        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = function(*args, **(kwargs or {}))
            for one in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(one, Tensor):  # a view of many is no memory
                    self.largest = max(self.largest, one.untyped_storage().nbytes() // 4)
            return out

    with torch.set_grad_enabled(training), Watch() as watch:  # type: ignore[no-untyped-call]
        out = model(**given, use_cache=False).logits
        if training:
            out.sum().backward()
    return int(watch.largest)


def test_falcon_is_told_and_told_back() -> None:
    """Its model folds ALiBi into the mask again as soon as one of its layers is not ours."""
    case = Falcon()
    model: Any = case.model()
    body = model.transformer
    assert body.use_alibi
    with ab.fuse(model, quiet=True, measure=False):
        assert not body.use_alibi
        assert not copy.deepcopy(model).transformer.use_alibi
    assert body.use_alibi
    body.h[1].self_attention.forward = body.h[1].self_attention.forward
    with pytest.raises(Refused, match="forward"):
        ab.fuse(model, quiet=True)
    assert body.use_alibi


def test_falcon_with_a_mask_of_four_dimensions() -> None:
    """Stock cannot make positions of it; fused it is said in one sentence."""
    case = Falcon()
    model: Any = case.model()
    given: dict[str, Any] = {**case.inputs(2, 9), "attention_mask": torch.ones(2, 1, 9, 9) > 0}
    with pytest.raises(ValueError, match="unpack"):
        model(**given)
    with (
        ab.fuse(model, quiet=True, measure=False),
        pytest.raises(Refused, match=r"must be \(batch, length\)"),
    ):
        model(**given)


def test_mpt_beyond_its_length() -> None:
    """More keys than its ALiBi has numbers: the model's own error."""
    case = Mpt()
    model: Any = case.model(max_seq_len=32)
    with ab.fuse(model, quiet=True, measure=False), pytest.raises(RuntimeError):
        case.run(model, case.inputs(1, 40))


def test_bloom_in_slices_is_refused() -> None:
    case = Bloom()
    model: Any = case.model(pretraining_tp=2, slow_but_exact=True)
    with pytest.raises(Refused, match="slow_but_exact=False"):
        ab.fuse(model, quiet=True)
