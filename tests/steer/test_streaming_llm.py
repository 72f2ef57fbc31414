from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import attnbias as ab
from tests.cases.rule import RELATIVE, RuleCase, off, padded
from tests.steer.dense import Map
from tests.steer.models import DECODERS, VOCABULARY, Subject, make, redraw, sharpen, tokens

SINKS = 2


class Self(RuleCase):
    """The case on towers that read their own text: decoders, and an encoder among them."""

    @pytest.fixture(params=("stories", "minilm", "mistral", "gpt_oss", "bart decoder"))
    def subject(self, request: pytest.FixtureRequest) -> Subject:
        return make(request.param, request)

    @pytest.fixture(params=("stories", "minilm", "mistral", "gpt_oss", "bart decoder"))
    def every(self, request: pytest.FixtureRequest) -> Subject:
        return make(request.param, request)


class TestText(Self):
    """Only hiding keys: the pattern."""

    __test__ = True
    zero, small, large = 500, 4, 2

    def rule(self, strength: int, **where: Any) -> ab.rules.StreamingLLM:
        return ab.rules.StreamingLLM(sinks=SINKS, recent=strength, positions="text", **where)

    def dense(self, strength: int) -> Callable[[Map], Tensor]:
        def rewrite(found: Map) -> Tensor:
            where = found.positions
            query = where.amax(-1, keepdim=True) if found.decoding else found.query_positions
            seen = (where < SINKS)[:, None] | (query[:, :, None] - where[:, None] <= strength)
            weights = found.probabilities * seen[:, None]
            sums = weights.sum(-1, keepdim=True) + found.rest
            return torch.where(sums > 0, weights / sums, found.probabilities)

        return rewrite


# Positions in the cache -----------------------------------------------------------------------


@contextmanager
def rolling(model: Any, sinks: int, recent: int, heads: list[int] | None = None) -> Iterator[None]:
    """The published procedure, row by row: keys are kept without rotary embedding, the first and
    the last of them stay, and what is kept is numbered from 0.
    """
    file = sys.modules[type(model).__module__]
    apply = file.apply_rotary_pos_emb
    turns: list[Any] = []
    rotary = next(m for n, m in model.named_modules() if n.endswith("rotary_emb"))

    def keep(query: Tensor, key: Tensor, *rest: Any, **_: Any) -> tuple[Tensor, Tensor]:
        turns.append(rest)
        return query, key

    def forward(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        sink = getattr(module, "sinks", None)
        cos, sin = turns[-1][:2]
        whole = apply(query, key, cos, sin)
        own = {}
        if "layer_type" in inspect.signature(rotary.forward).parameters:
            own["layer_type"] = model.config.layer_types[module.layer_idx]
        rows = []
        for i in range(query.shape[2]):
            kept = [j for j in range(i + 1) if j < sinks or i - j <= recent]
            k = key[:, :, kept]
            cos, sin = rotary(query.float(), torch.arange(len(kept))[None], **own)
            k = apply(k, k, cos, sin)[0]
            q = query[:, :, i : i + 1].expand(-1, -1, len(kept), -1)
            q = apply(q, q, cos, sin)[0][:, :, -1:]
            line = torch.full((*query.shape[:2], 1, key.shape[2]), -torch.inf, dtype=torch.double)
            line[..., kept] = q.double() @ k.double().mT * scale
            if heads is not None:
                plain = whole[0][:, :, i : i + 1].double() @ whole[1].double().mT * scale
                plain[..., i + 1 :] = -torch.inf
                chosen = torch.zeros(query.shape[1], dtype=torch.bool)
                chosen[heads] = True
                line = torch.where(chosen[:, None, None], line, plain)
            if mask is not None:
                line = line.masked_fill(mask[:, :, i : i + 1] < -1, -torch.inf)
            extra = torch.full_like(line[..., :1], -torch.inf)
            if sink is not None:
                extra = sink.double().reshape(1, -1, 1, 1).expand_as(extra)
            rows.append(torch.cat([line, extra], -1).softmax(-1)[..., :-1] @ value.double())
        return torch.cat(rows, 2).to(query.dtype).transpose(1, 2).contiguous(), None

    with (
        mock.patch.object(file, "apply_rotary_pos_emb", keep),
        mock.patch.object(file, "eager_attention_forward", forward),
    ):
        yield


def small(kind: str) -> Subject:
    """Rotary embeddings of other forms: part of each head, and neighbouring dimensions in pairs."""
    import transformers

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
    }
    if kind == "neox":
        config = transformers.GPTNeoXConfig(**sizes, rotary_pct=0.5)
        return Subject(
            kind, redraw(transformers.GPTNeoXForCausalLM(config)).eval(), {"input_ids": tokens()}
        )
    if kind == "gemma3":
        kinds = ["sliding_attention", "full_attention"]
        config = transformers.Gemma3TextConfig(
            **sizes, num_key_value_heads=2, head_dim=8, layer_types=kinds, sliding_window=7
        )
        model = sharpen(redraw(transformers.Gemma3ForCausalLM(config)).eval(), 4.0)
        return Subject(kind, model, {"input_ids": tokens()})
    config = transformers.CohereConfig(**sizes, num_key_value_heads=2, logit_scale=1.0)
    model = sharpen(redraw(transformers.CohereForCausalLM(config)).eval(), 4.0)
    return Subject(kind, model, {"input_ids": tokens()})


@torch.no_grad()
@pytest.mark.parametrize("heads", [None, [0, 3]])
@pytest.mark.parametrize("name", [*DECODERS, "neox", "cohere", "gemma3"])
def test_positions_in_the_cache(
    name: str, heads: list[int] | None, request: pytest.FixtureRequest
) -> None:
    subject = make(name, request) if name in DECODERS else small(name)
    rule = ab.rules.StreamingLLM(sinks=SINKS, recent=3, heads=heads or "all")
    with ab.steer(subject.model, rule):
        found = subject.run(use_cache=False)
    eager = subject.eager()
    with rolling(eager, SINKS, 3, heads):
        wanted = subject.run(eager, use_cache=False)
        less = {"input_ids": subject.inputs["input_ids"][:, :6]}
        start = subject.run(eager, use_cache=False, **less)
    # Up to sinks + recent tokens nothing moves.
    assert off(start, subject.run(use_cache=False)[:, :6]) < RELATIVE
    assert off(found, wanted) < RELATIVE
    text = ab.rules.StreamingLLM(sinks=SINKS, recent=3, heads=heads or "all", positions="text")
    with ab.steer(subject.model, text):
        assert off(subject.run(use_cache=False), wanted) > 30 * RELATIVE


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["stories", "mistral", "gpt_oss"])
def test_positions_in_the_cache_under_padding_and_decoding(
    name: str, side: str, request: pytest.FixtureRequest
) -> None:
    """Rows of a padded batch, chunks and steps give what one row alone gives in one pass."""
    from transformers import DynamicCache

    subject = make(name, request)
    rule = ab.rules.StreamingLLM(sinks=SINKS, recent=3, heads="all")
    inputs, _, rows = padded(subject, side)
    with ab.steer(subject.model, rule):
        found = subject.run(**inputs)
        for row, part in enumerate(rows):
            ids = inputs["input_ids"][row : row + 1, part]
            alone = subject.model(input_ids=ids).logits
            assert off(found[row, part], alone[0]) < RELATIVE
            cache, parts = DynamicCache(config=subject.model.config), []
            for chunk in (ids[:, :4], ids[:, 4:7], *ids[:, 7:].split(1, 1)):
                out = subject.model(input_ids=chunk, past_key_values=cache, use_cache=True)
                parts.append(out.logits)
            assert off(torch.cat(parts, 1), alone) < RELATIVE


@torch.no_grad()
def test_generate_sees_what_is_kept() -> None:
    """Under `generate` what falls out of the window does not matter any more."""
    subject = small("cohere")
    ids, model = subject.inputs["input_ids"][:1], subject.model
    # One layer: deeper ones carry what was read before it fell out.
    model.model.layers = model.model.layers[:1]
    other = ids.clone()
    other[:, 3:8] = 77
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    rule = ab.rules.StreamingLLM(sinks=SINKS, recent=4, heads="all")
    with ab.steer(model, rule):
        one, two = (model.generate(input_ids=i, **options).scores for i in (ids, other))
    assert max(off(a, b) for a, b in zip(one, two, strict=True)) < 1e-6
    one, two = (model.generate(input_ids=i, **options).scores for i in (ids, other))
    assert off(one[0], two[0]) > 1e-3


def test_what_is_refused(request: pytest.FixtureRequest) -> None:
    for fields, words in (
        ({"sinks": -1}, "sinks must be a whole number from 0"),
        ({"recent": 2.5}, "recent must be a whole number from 0"),
        ({"positions": "page"}, "positions must be 'cache' or 'text'"),
    ):
        with pytest.raises(ab.AttnbiasError, match=words):
            ab.rules.StreamingLLM(heads="all", **fields)
    for name, towers, words in (
        ("bart cross", ("cross",), "reads another text"),
        ("bart decoder", ("decoder",), "no rotary embedding .*positions='text'"),
        ("qwen2_vl", ("text",), "several axes"),
    ):
        subject = make(name, request)
        rule = ab.rules.StreamingLLM(sinks=1, recent=2, heads="all", towers=towers)
        with pytest.raises(ab.Refused, match=words), ab.steer(subject.model, rule):
            subject.run()


@torch.no_grad()
def test_frequencies_that_move_are_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    )
    model = LlamaForCausalLM(config).eval()
    rule = ab.rules.StreamingLLM(sinks=1, recent=2, heads="all")
    with pytest.raises(ab.Refused, match=r"'dynamic'.*positions='text'"), ab.steer(model, rule):
        model(input_ids=tokens())
