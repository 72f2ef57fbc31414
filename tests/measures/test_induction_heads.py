"""Induction heads: prefix matching on probes, copying from the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import attnbias as ab
from attnbias.errors import AttnbiasError, Refused
from attnbias.measures import InductionHeads, Measure
from attnbias.measures.circuits import copying, head_matrices
from tests.cases.measure import Maps, MeasureCase, eager_maps
from tests.steer import models
from tests.steer.models import Subject

LENGTH, REPEATS = 7, 3


class TestInductionHeads(MeasureCase):
    subjects: ClassVar[tuple[str, ...]] = ("stories", "mistral", "gpt_oss", "llava", "minilm")
    needs_data: ClassVar[bool] = False
    copies: ClassVar[Any] = "all"

    def build(self, subject: Subject) -> Measure:
        decoder = subject.name in ("stories", "mistral")
        return InductionHeads(LENGTH, REPEATS, 3, 1, copies=self.copies, copying=decoder)

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        measure = self.build(subject)
        assert isinstance(measure, InductionHeads)
        probes, _, start = measure.probes(subject.model)
        (layers,) = eager_maps(subject, {"input_ids": probes}).values()
        found = torch.zeros(3, len(layers), layers[0].shape[1], dtype=torch.float64)
        for row, ids in enumerate(probes.tolist()):
            for query in range(start + LENGTH, start + LENGTH * REPEATS):
                earlier = [n for n in range(start, query) if ids[n] == ids[query]]
                for key in earlier if self.copies == "all" else earlier[-1:]:
                    for n, layer in enumerate(layers):
                        found[row, n] += layer[row, :, query, key + 1]
        return found / (LENGTH * (REPEATS - 1))


class TestTheLastCopy(TestInductionHeads):
    subjects: ClassVar[tuple[str, ...]] = ("stories",)
    copies: ClassVar[Any] = "last"


def test_its_details(stories: Any) -> None:
    subject = models.stories(stories)
    measure = InductionHeads(LENGTH, REPEATS, 2)
    scores = measure.measure(subject.model)
    probes, controls, start = measure.probes(subject.model)
    assert start == 1
    assert bool((probes[:, 0] == 1).all())
    assert all(len(set(row.tolist())) == LENGTH for row in probes[:, 1 : 1 + LENGTH])
    (layers,) = eager_maps(subject, {"input_ids": probes}).values()
    before = torch.stack([p.diagonal(-1, 2, 3)[..., 1:].mean((0, 2)) for p in layers])
    assert torch.allclose(scores.details["previous"], before, atol=1e-5)
    (other,) = eager_maps(subject, {"input_ids": controls}).values()
    after = other[2][:, :, 1 + 2 * LENGTH :].double()  # the third block: two earlier keys a query
    last = sum(after[:, :, n, 1 + n + 1 + m] for n in range(LENGTH) for m in (0, LENGTH))
    middle = sum(other[2][:, :, 1 + LENGTH + n, 2 + n] for n in range(LENGTH))
    assert scores.control is not None
    assert torch.allclose(scores.control[:, 2], (last + middle) / (2 * LENGTH), atol=1e-5)
    with torch.no_grad():
        logs = subject.model(probes).logits.log_softmax(-1)
    losses = -logs[:, :-1].gather(-1, probes[:, 1:, None])[..., 0]
    assert torch.allclose(scores.details["losses"][:, 1:].float(), losses, atol=1e-4)
    assert scores.details["losses"][:, 0].isnan().all()
    late = losses[:, 2 * LENGTH + 1 :].mean(1) - losses[:, 1:LENGTH].mean(1)
    assert torch.allclose(scores.details["in_context"].float(), late, atol=1e-4)


def families() -> dict[str, nn.Module]:
    import transformers as t

    torch.manual_seed(0)
    llama = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
    small = {**llama, "intermediate_size": 40, "pad_token_id": 0}
    made = {
        "llama": t.LlamaForCausalLM(t.LlamaConfig(**small, num_key_value_heads=2)),
        "phi3": t.Phi3ForCausalLM(t.Phi3Config(**small, num_key_value_heads=2)),
        "neox": t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**small)),
        "gemma": t.GemmaForCausalLM(t.GemmaConfig(**small, num_key_value_heads=1, head_dim=8)),
        "gpt2": t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=61)),
        "opt": t.OPTForCausalLM(
            t.OPTConfig(**llama, ffn_dim=40, word_embed_proj_dim=32, pad_token_id=0)
        ),
    }
    for model in made.values():
        models.redraw(model)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim == 1:
                    weight.copy_(torch.rand_like(weight) + (0.5 if "weight" in name else 0))
    return {name: model.eval() for name, model in made.items()}


NORMS = {"gpt2": ("transformer.ln_f", "ln_1"), "neox": ("gpt_neox.final_layer_norm", None)}
NORMS["opt"] = ("model.decoder.final_layer_norm", "self_attn_layer_norm")


@pytest.mark.parametrize("name", ["llama", "phi3", "neox", "gemma", "gpt2", "opt"])
def test_matrices_are_those_of_the_module_and_the_score_that_of_the_whole_matrix(name: str) -> None:
    model: Any = families()[name]
    from attnbias.hub.layers import layers

    seen: dict[int, list[Tensor]] = {}
    handles = []
    for site, parts in layers(model).items():

        def keep(m: Any, args: Any, given: Any, out: Any, layer: int = site.layer) -> None:
            x = given["hidden_states"] if "hidden_states" in given else args[0]
            seen[layer] = [x.detach(), out[0].detach()]

        handles.append(parts.core.register_forward_hook(keep, with_kwargs=True))
    with torch.no_grad():
        for token in (5, 17):  # one token attends to itself alone: the module is linear
            model(torch.tensor([[token]]))
            if token == 5:
                first, seen = seen, {}
    for handle in handles:
        handle.remove()
    want = []
    last, before = NORMS.get(name, ("model.norm", "input_layernorm"))
    embed = model.get_input_embeddings().weight.detach().double()
    unembed = model.get_output_embeddings().weight.detach().double()
    for site, parts in layers(model).items():
        values, outs = head_matrices(parts.core)
        gap = first[site.layer][0][0, 0] - seen[site.layer][0][0, 0]
        wrote = torch.einsum("hdv,hve,e->d", outs, values, gap)
        got = first[site.layer][1].flatten() - seen[site.layer][1].flatten()
        assert torch.allclose(wrote, got, atol=1e-4)
        norm = getattr(parts.layer, before or "input_layernorm")
        row = []
        for value, out in zip(values.double(), outs.double(), strict=True):
            read = reads(norm, name) @ embed.T  # (size, vocabulary)
            shown = unembed @ reads(model.get_submodule(last), name)
            whole = shown @ out @ value @ read
            eigen = torch.linalg.eigvals(whole)
            row.append(eigen.sum().real / eigen.abs().sum())
        want.append(torch.stack(row))
    assert torch.allclose(copying(model, "text"), torch.stack(want), atol=1e-5)


def reads(norm: Any, name: str) -> Tensor:
    """A norm as a matrix, without what it divides by."""
    gain = norm.weight.detach().double() + (name == "gemma")
    found = torch.diag(gain)
    if isinstance(norm, nn.LayerNorm):
        size = len(gain)
        found = found @ (torch.eye(size).double() - torch.full((size, size), 1 / size).double())
    return found


def test_a_planted_induction_head_is_found() -> None:
    """Keys that hold the token before, queries the token itself: one layer, made by hand."""
    from experiments._induction import decoder

    model = decoder(0, 1, 2, smeared=True)
    size = model.config.hidden_size
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.model.norm.weight.fill_(1)
        model.model.layers[0].input_layernorm.weight.fill_(1)
        # Two features a token in the dimensions of the head that turn slowest.
        angle = torch.arange(48) * 2 * torch.pi / 48
        model.model.embed_tokens.weight[:, 0] = angle.cos()
        model.model.embed_tokens.weight[:, 1] = angle.sin()
        attention.k_proj.alpha.copy_(torch.tensor([-20.0, 20.0]))  # head 0: the token before
        for head in (0, 1):
            for n, dim in enumerate((6, 7)):
                attention.q_proj.weight[head * 16 + dim, n] = 40
                attention.k_proj.inner.weight[head * 16 + dim, n] = 40
    assert size == 64
    measure = InductionHeads(8, 2, 4, tokens=range(3, 48, 5), first=0, copying=False)
    scores = measure.measure(model)
    assert scores.of(0, 0) > 0.9
    assert scores.of(0, 1) < 0.1
    assert scores.top(1) == ((0, 0),)
    assert scores.control is not None
    assert float(scores.control.mean(0)[0, 0]) < 0.4


BAD: list[tuple[Mapping[str, Any], str]] = [
    ({"length": 1}, "length"),
    ({"repeats": 1}, "repeats"),
    ({"count": 0}, "count"),
    ({"copies": "some"}, "copies"),
]


@pytest.mark.parametrize(("given", "word"), BAD)
def test_bad_fields(given: Mapping[str, Any], word: str) -> None:
    with pytest.raises(AttnbiasError, match=word):
        InductionHeads(**given)


def test_what_it_refuses() -> None:
    subject = models.mistral()
    with pytest.raises(AttnbiasError, match="leave data out"):
        InductionHeads(copying=False).measure(subject.model, [subject.inputs])
    with pytest.raises(AttnbiasError, match="reads 64"):
        InductionHeads().measure(subject.model)
    with pytest.raises(AttnbiasError, match="numbers from 0 to 96"):
        InductionHeads(4, 2, tokens=[5, 97]).measure(subject.model)
    with pytest.raises(AttnbiasError, match="as many"):
        InductionHeads(4, 2, tokens=[5, 6, 7]).measure(subject.model)
    with pytest.raises(AttnbiasError, match="first"):
        InductionHeads(4, 2, first=200).measure(subject.model)
    with pytest.raises(Refused, match="one tower"):
        InductionHeads(4, 2).measure(models.vit().model)
    with pytest.raises(Refused, match="one tower of text"):
        InductionHeads(4, 2).measure(models.bart("encoder").model)
    assert ab.measures.InductionHeads is InductionHeads
