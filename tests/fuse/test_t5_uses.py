"""What people do with T5: caches, beams, checkpoints, compilers, other models around its stacks."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnbias as ab
from attnbias.errors import Refused
from attnbias.fuse import modes, t5_older
from attnbias.fuse.families.t5 import structure
from tests.cases.fuse_parts import Padded, Trained, entropies
from tests.fuse import test_t5 as cases

KINDS: dict[str, dict[str, Any]] = {
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "static beams": {"num_beams": 3, "cache_implementation": "static"},
    "without cache": {"use_cache": False},
    "sampled": {"do_sample": True},
}


class Forecaster(nn.Module):
    """Two stacks of T5 fed with embeddings of patches of a series, as Chronos-Bolt builds them."""

    def __init__(self, **changes: Any) -> None:
        from transformers import T5Config
        from transformers.models.t5.modeling_t5 import T5Stack

        super().__init__()
        given = {**cases.SMALL, "vocab_size": 2, **changes}
        self.encoder = T5Stack(T5Config(**given, is_decoder=False, use_cache=False))
        self.decoder = T5Stack(T5Config(**given, is_decoder=True, use_cache=False))
        self.inward = nn.Linear(8, 32)
        self.outward = nn.Linear(32, 9 * 8)

    def forward(self, patches: Tensor, attention_mask: Tensor | None = None) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        whole = self.inward(patches)
        seen = self.encoder(inputs_embeds=whole, attention_mask=attention_mask).last_hidden_state
        first = self.decoder.embed_tokens(torch.tensor([[0, 1, 0]]).expand(len(patches), -1))
        made = self.decoder(
            inputs_embeds=first, encoder_hidden_states=seen, encoder_attention_mask=attention_mask
        ).last_hidden_state
        return BaseModelOutput(last_hidden_state=self.outward(made))


class TestForecaster(Padded, Trained):
    """The forecasting models built on T5: a small vocabulary, another module around the stacks."""

    def build(self, **changes: Any) -> nn.Module:
        return Forecaster(**changes)

    def inputs(self, batch: int, length: int) -> dict[str, Tensor]:
        return {"patches": torch.randn(batch, length, 8)}

    def padded(self, length: int) -> tuple[dict[str, Tensor], Tensor]:
        given, _ = super().padded(length)
        return given, torch.ones(2, 3, dtype=torch.bool)  # a forecast is whole


@pytest.mark.parametrize("kind", KINDS)
def test_ways_to_generate(kind: str) -> None:
    case = cases.TestT5()
    model: Any = case.model()
    tokens = case.inputs(2, 33)["input_ids"]
    more = {"min_new_tokens": 24, "max_new_tokens": 24, "no_repeat_ngram_size": 2}
    more |= {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}

    def generate() -> Any:
        torch.manual_seed(4)
        return model.generate(input_ids=tokens, **{**more, **KINDS[kind]})

    wanted = generate()
    with ab.fuse(model, quiet=True, measure=False), modes.taking("fused"):
        found = generate()
    assert torch.equal(found.sequences, wanted.sequences)
    for one, other in zip(found.logits, wanted.logits, strict=True):
        assert case.off(one, other) <= 1e-4


def test_a_decoded_token_is_not_structured() -> None:
    """A row of bias is no matrix: with the cache, the model's own code runs, however long it is."""
    case = cases.TestT5()
    model: Any = case.model()
    with ab.fuse(model, quiet=True, measure=False) as fused, modes.recording() as seen:
        family = model.decoder.block[0].layer[0].SelfAttention._attnbias_fused.family
        for queries, keys, wanted in ((1, 2**20, False), (16, 16, False), (600, 600, True)):
            assert family.pays(torch.device("cpu"), 4, queries, keys) is wanted
        with torch.no_grad():
            model(**case.inputs(1, 9))
    assert seen == []
    assert fused.replaced == 6


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("route", ["fused", "stock"])
def test_checkpoints(reentrant: bool, route: Any) -> None:
    """The table's gradient is whole also where each layer is computed again alone."""
    case = cases.TestT5()
    model: Any = case.model(dropout_rate=0.0, num_layers=3).train()
    given = case.inputs(2, 21)
    case.loss(model, given).backward()
    wanted = {name: one.grad.clone() for name, one in model.named_parameters()}
    with ab.fuse(model, quiet=True, measure=False), modes.taking(route):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        case.loss(model, given).backward()
    for name, one in model.named_parameters():
        scale = max(float(wanted[name].abs().max()), 1e-3)
        assert float((one.grad - wanted[name]).abs().max()) <= 1e-4 * scale, name


def test_no_matrix_of_scores_is_made() -> None:
    """Neither a bias nor a mask nor zeros of N x N numbers, in both stacks, with padding."""
    case = cases.TestT5()
    model = case.model()
    given, _ = case.padded(400)
    with ab.fuse(model, quiet=True, measure=False), modes.taking("fused"):
        largest = _largest(model, given)
    assert largest < 400 * 400
    assert _largest(model, given) >= 400 * 400


def _largest(model: nn.Module, given: dict[str, Tensor]) -> int:
    """Numbers of the largest tensor that an operator of PyTorch returns in a forward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = function(*args, **(kwargs or {}))
            for one in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(one, Tensor):  # a view of many is no memory
                    self.largest = max(self.largest, one.untyped_storage().nbytes() // 4)
            return out

    with torch.no_grad(), Watch() as watch:
        model(**given)
    return watch.largest


def test_maps_of_all_kinds_are_stock() -> None:
    case = cases.TestT5()
    model: Any = case.model()
    model.set_attn_implementation("eager")
    given = {**case.inputs(2, 19), "output_attentions": True}
    with torch.no_grad():
        wanted = model(**given)
        with ab.fuse(model, quiet=True, measure=False), modes.taking("fused"):
            found = model(**given)
    for name in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        for one, other in zip(getattr(found, name), getattr(wanted, name), strict=True):
            assert torch.allclose(one, other, atol=1e-6)
    assert float(entropies(wanted.decoder_attentions).min()) < 0.5


def test_masks_that_people_make() -> None:
    """A mask of 4 dimensions goes as it is, beside the structured bias."""
    case = cases.TestT5Encoder()
    model = case.model()
    given: dict[str, Any] = case.inputs(2, 45)
    given["attention_mask"] = torch.rand(2, 1, 45, 45) > 0.3
    wanted = case.run(model, given)
    with ab.fuse(model, quiet=True, measure=False), modes.recording() as seen:
        assert case.off(case.run(model, given), wanted) <= 1e-5
    assert len(seen) == 2


def test_autocast() -> None:
    case = cases.TestT5Encoder()
    model = case.model()
    given = case.inputs(2, 45)
    exact = case.run(model, given)
    with torch.autocast("cpu", torch.bfloat16):
        stock = case.off(case.run(model, given), exact)
        with ab.fuse(model, quiet=True, measure=False):
            assert case.off(case.run(model, given), exact) <= 1.5 * stock + 1e-2
    assert stock > 1e-4


def test_double_precision_and_odd_buckets() -> None:
    case = cases.TestT5Encoder()
    more = {"relative_attention_num_buckets": 10, "relative_attention_max_distance": 21}
    model: Any = case.model(**more)
    given = case.inputs(1, 61)
    wanted = case.run(model, given)
    with ab.fuse(model, quiet=True, measure=False):
        assert case.off(case.run(model, given), wanted) <= 1e-5
    if t5_older.is_older(model.encoder.block[0].layer[0].SelfAttention):
        return  # its softmax is in single precision whatever it is given
    model = model.double()
    wanted = case.run(model, given)
    with ab.fuse(model, quiet=True, measure=False):
        assert case.off(case.run(model, given), wanted) <= 1e-12


def test_a_table_that_changes() -> None:
    """Nothing of the table is kept from one forward to the next."""
    case = cases.TestT5Encoder()
    model: Any = case.model()
    given = case.inputs(2, 45)
    with ab.fuse(model, quiet=True, measure=False):
        first = case.run(model, given)
        with torch.no_grad():
            model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.mul_(-1)
        found = case.run(model, given)
    assert case.off(found, first) > 1e-2
    assert case.off(found, case.run(model, given)) <= 1e-5


def test_layers_that_reuse_a_bias_are_checked_with_one() -> None:
    """The example of such a layer carries the bias of its stack, the same in both states."""
    model: Any = cases.TestT5().model()
    with ab.fuse(model, quiet=True, measure=False) as fused:
        pass
    assert sum(len(one.names) for one in fused.sites) == 6
    assert any("EncDecAttention" in name for one in fused.sites for name in one.names)
    layer = model.encoder.block[0].layer[0].SelfAttention
    bias = structure(layer, 30, 50, 0)
    assert torch.allclose(bias.tensor(), layer.compute_bias(30, 50))


@pytest.mark.parametrize("backend", ["eager"])
def test_compiled(backend: str) -> None:
    case = cases.TestT5Encoder()
    model = case.model(num_layers=1)
    given = case.inputs(2, 45)
    wanted = case.run(model, given)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend=backend)
    with ab.fuse(model, quiet=True, measure=False), modes.recording() as seen:
        assert case.off(case.run(compiled, given), wanted) <= 1e-5
        assert len(seen) == 1
        torch._dynamo.reset()
        strict: Any = torch.compile(model, backend=backend, fullgraph=True)
        with pytest.raises(Exception, match="without fullgraph"):
            case.run(strict, given)
    assert case.off(case.run(compiled, given), wanted) <= 1e-6
    torch._dynamo.reset()


def test_own_subclasses_are_refused() -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    class Own(T5Attention):  # type: ignore[misc]
        def compute_bias(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().compute_bias(*args, **kwargs)

    class Forwarded(T5Attention):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    for kind, words in ((Own, "compute_bias of its own"), (Forwarded, "forward of its own")):
        model: Any = cases.TestT5Encoder().build()
        model.encoder.block[0].layer[0].SelfAttention.__class__ = kind
        with ab.fuse(model, quiet=True, measure=False) as fused:
            assert [(one.kind, one.names) for one in fused.left] == [
                (kind.__name__, ("encoder.block.0.layer.0.SelfAttention",))
            ]
            assert words in fused.left[0].reason


def test_other_tables_are_refused() -> None:
    model: Any = cases.TestT5Encoder().build()
    layer = model.encoder.block[0].layer[0].SelfAttention
    layer.relative_attention_bias = nn.Embedding(32, 4, max_norm=1.0)
    del model.encoder.block[1]
    with pytest.raises(Refused, match=r"plain nn\.Embedding"):
        ab.fuse(model, quiet=True)


def test_one_layer_alone() -> None:
    """A module without a model around it, given no bias, adds none."""
    model: Any = cases.TestT5Encoder().model()
    layer = model.encoder.block[1].layer[0].SelfAttention
    hidden = torch.randn(2, 45, 32)
    names = inspect.signature(type(layer).forward).parameters
    more = {"cache_position": torch.arange(45)} if "cache_position" in names else {}
    with torch.no_grad():
        wanted = layer(hidden, **more)[0]
        with ab.fuse(layer, quiet=True, measure=False), modes.taking("fused"):
            assert torch.allclose(layer(hidden, **more)[0], wanted, atol=1e-5)
            assert torch.allclose(layer(hidden, None, None, None, **more)[0], wanted, atol=1e-5)


def test_a_layer_left_alone_gets_what_its_code_expects() -> None:
    """Among fused layers: one that computes with the bias of the first gets a tensor."""
    from transformers.models.t5.modeling_t5 import T5Attention

    class Forwarded(T5Attention):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    case = cases.TestT5()
    model: Any = case.model(num_layers=3)
    given, real = case.padded(45)
    wanted = case.run(model, given)
    for stack in (model.encoder, model.decoder):
        for layer in stack.block[1].layer[:-1]:
            name = "SelfAttention" if hasattr(layer, "SelfAttention") else "EncDecAttention"
            getattr(layer, name).__class__ = Forwarded
    with ab.fuse(model, quiet=True, measure=False) as fused, modes.recording() as seen:
        assert case.off(case.run(model, given)[real], wanted[real]) <= 1e-5
    assert len(fused.left) == 1
    assert len(fused.left[0].names) == 3
    assert len(seen) == 6
