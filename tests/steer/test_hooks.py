"""The hooks on one attention call beside a float64 rewrite of the eager attention of the model."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.bias import Bias, KeyBias
from attnbias.steer import Rule, SiteCall, Vectors
from tests.cases.rule import RELATIVE, off, padded
from tests.steer.dense import numbering
from tests.steer.models import DECODERS, Subject, make, tokens
from tests.steer.sample_rules import SetShare

SELF = ("stories", "minilm", "mistral", "gpt_oss", "vit", "bart decoder", "bart cross")
KeyShift = ab.rules.KeyShift

# The other route ----------------------------------------------------------------------------------


@dataclass
class Parts:
    """One attention call in float64, one key and value per query head; edited in place."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor  # 0 or minus infinity
    sink: Tensor  # (heads): a logit, minus infinity where there is none
    scale: float
    extra_key: Tensor | None = None  # (1, heads, extra, dim)
    extra_value: Tensor | None = None
    bias: Tensor | float = 0.0
    share: tuple[Tensor, float, list[int]] | None = None  # keys, their share, heads

    def map(self) -> Tensor:
        """The map over the model's keys, then the extra ones."""
        scores = self.query @ self.key.mT * self.scale + self.mask + self.bias
        parts = [scores]
        if self.extra_key is not None:
            parts.append(self.query @ self.extra_key.mT * self.scale)
        parts.append(self.sink.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1))
        whole = torch.cat(parts, -1)
        blind = (whole == -torch.inf).all(-1, keepdim=True)
        p = torch.where(blind, 0.0, whole).softmax(-1)[..., :-1].masked_fill(blind, 0.0)
        if self.share is not None:
            keys, share, heads = self.share
            own = p[..., : scores.shape[-1]]
            inside, outside = ((own * part).sum(-1, keepdim=True) for part in (keys, ~keys))
            both = (inside > 1e-30) & (outside > 1e-30)  # less than that is none
            total = inside + outside
            new = torch.where(
                keys, own * share * total / inside, own * (1 - share) * total / outside
            )
            chosen = torch.zeros(p.shape[1], dtype=torch.bool)
            chosen[heads] = True
            own = torch.where(both & chosen[:, None, None], new, own)
            p = torch.cat([own, p[..., scores.shape[-1] :]], -1)
        return p

    def out(self) -> Tensor:
        value = self.value
        if self.extra_value is not None:
            value = torch.cat([value, self.extra_value.expand(len(value), -1, -1, -1)], 2)
        return self.map() @ value


Change = Callable[[Parts], None]


@contextlib.contextmanager
def by_hand(
    model: Any,
    change: Change,
    layers: list[int] | None = None,
    towers: Any = None,
    after: Callable[[Tensor], Tensor] | None = None,
    seen: list[Parts] | None = None,
) -> Iterator[None]:
    numbers = numbering(model)
    files = {type(m).__module__ for m in model.modules() if id(m) in numbers}

    def forward(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        tower, layer = numbers[id(module)]
        group = query.shape[1] // key.shape[1]
        q, k, v = query.double(), *(t.double().repeat_interleave(group, 1) for t in (key, value))
        hidden = torch.zeros(1, 1, q.shape[2], k.shape[2], dtype=torch.double)
        if mask is not None:
            part = mask[..., : k.shape[2]]
            hidden = hidden.masked_fill(part <= torch.finfo(part.dtype).min / 2, -torch.inf)
        sinks = getattr(module, "sinks", None)
        none = torch.full((q.shape[1],), -torch.inf, dtype=torch.double)
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        parts = Parts(q, k, v, hidden, none if sinks is None else sinks.double(), scale)
        ours = (layers is None or layer in layers) and (towers is None or tower in towers)
        if ours:
            change(parts)
        out = parts.out()
        if ours and after is not None:
            out = after(out)
        if ours and seen is not None:
            seen.append(parts)
        return out.to(query.dtype).transpose(1, 2).contiguous(), None

    with contextlib.ExitStack() as stack:
        for file in files:
            patch = mock.patch.object(sys.modules[file], "eager_attention_forward", forward)
            stack.enter_context(patch)
        yield


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


# Rules that use the hooks -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Turn(Rule):
    """Queries, keys or values (any of them) times a factor, plus a vector per head number."""

    parts: tuple[str, ...]
    factor: float = 1.5

    def vectors(self, site: SiteCall) -> Vectors | None:
        if self.factor == 0:
            return None
        made: dict[str, Tensor] = {}
        for part in self.parts:
            old = getattr(site, part)
            made[part] = turned(old.double(), site.heads, self.factor)
        return Vectors(**made)


def turned(old: Tensor, heads: Any, factor: float) -> Tensor:
    """Also uneven along the tokens, so that a key in the wrong place would be seen."""
    step = torch.arange(old.shape[2]).double().cos()[:, None]
    head = torch.tensor([float(head) for head in heads])[:, None, None]
    return old * factor + 0.3 * step * (1 + head)


@dataclass(frozen=True, kw_only=True)
class Explicit(Rule):
    """Two keys of its own for every query."""

    size: int = 2
    one: bool = False  # the same for all heads

    def vectors(self, site: SiteCall) -> Vectors | None:
        key, value = extras(site.heads, self.size, site.query.shape[-1], site.value.shape[-1])
        if self.one:
            key, value = key[:, :1], value[:, :1]
        kind = site.query.dtype
        return Vectors(extra_key=key.to(kind), extra_value=value.to(kind))


def extras(heads: Any, size: int, dim: int, wide: int) -> tuple[Tensor, Tensor]:
    index = list(heads)
    return noise(1, 16, size, dim, seed=1)[:, index], noise(1, 16, size, wide, seed=2)[:, index]


@dataclass(frozen=True, kw_only=True)
class Scale(Rule):
    """Head outputs of queries at chosen positions times a factor."""

    factor: float
    keys: tuple[int, ...] = ()

    def outputs(self, site: SiteCall, out: Tensor) -> Tensor | None:
        if self.factor == 1:
            return None
        at = site.where_queries(self.keys) if self.keys else site.query_positions >= 0
        return torch.where(at[:, None, :, None], out * self.factor, out)


@dataclass(frozen=True, kw_only=True)
class Watcher(Rule):
    """Keeps whatever a function makes of each call."""

    make: Callable[[SiteCall], Any] = field(default=lambda site: None, compare=False)

    def look(self, site: SiteCall) -> Any:
        return self.make(site)


@dataclass(frozen=True, kw_only=True)
class Weigh(Rule):
    """A bias on key 1, by what a function says of the call at that moment."""

    amount: float = 0.0
    ask: ClassVar[Callable[[SiteCall], Any]] = lambda site: None

    def bias(self, site: SiteCall) -> Bias | None:
        type(self).ask(site)
        weight = torch.zeros(site.shape[3], dtype=site.dtype)
        weight[1] = self.amount
        return KeyBias(weight)


@pytest.fixture(params=SELF)
def subject(request: pytest.FixtureRequest) -> Subject:
    return make(request.param, request)


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> Subject:
    return make(request.param, request)


def where(subject: Subject) -> dict[str, Any]:
    return {} if subject.towers is None else {"towers": subject.towers}


# Vectors ------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "parts", [("query",), ("key",), ("value",), ("query", "key", "value")], ids=" ".join
)
def test_vectors(subject: Subject, parts: tuple[str, ...]) -> None:
    """Also where heads share keys: a rule's head gets keys of its own."""
    rule = Turn(parts=parts, heads=[0, 3], layers=[1], **where(subject))
    with ab.steer(subject.model, rule):
        found = subject.run()

    def change(call: Parts) -> None:
        for part in parts:
            old = getattr(call, part).clone()
            old[:, [0, 3]] = turned(old[:, [0, 3]], (0, 3), 1.5)
            setattr(call, part, old)

    eager = subject.eager()
    with by_hand(eager, change, [1], subject.towers):
        wanted = subject.run(eager)
    assert off(found, wanted) < RELATIVE
    assert off(subject.run(), wanted) > 30 * RELATIVE


@torch.no_grad()
def test_vectors_compose_in_order(subject: Subject) -> None:
    """The second rule sees what the first has made, in one context and in nested ones."""
    first = Turn(parts=("query", "key"), factor=0.5, heads=[0, 1], **where(subject))
    second = Turn(parts=("query", "value"), factor=2.0, heads=[1, 3], **where(subject))
    with ab.steer(subject.model, first, second):
        found = subject.run()
    with ab.steer(subject.model, first), ab.steer(subject.model, second):
        nested = subject.run()
    with ab.steer(subject.model, second, first):
        swapped = subject.run()

    def change(call: Parts) -> None:
        for parts, factor, heads in ((first.parts, 0.5, [0, 1]), (second.parts, 2.0, [1, 3])):
            for part in parts:
                old = getattr(call, part).clone()
                old[:, heads] = turned(old[:, heads], heads, factor)
                setattr(call, part, old)

    eager = subject.eager()
    with by_hand(eager, change, None, subject.towers):
        wanted = subject.run(eager)
    assert off(found, wanted) < RELATIVE
    assert torch.equal(found, nested)
    assert off(swapped, wanted) > 30 * RELATIVE


@torch.no_grad()
def test_vectors_that_change_nothing_leave_the_plain_output(subject: Subject) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Same(Rule):
        def vectors(self, site: SiteCall) -> Vectors | None:
            return Vectors(query=site.query.clone(), key=site.key, value=site.value)

    plain = subject.run()
    for rule in (
        Same(heads="all", **where(subject)),
        Turn(parts=("query",), factor=0.0, heads="all", **where(subject)),
        Scale(factor=1.0, heads="all", **where(subject)),
        Explicit(size=0, heads="all", **where(subject)),
    ):
        with ab.steer(subject.model, rule):
            assert torch.equal(subject.run(), plain), rule


@torch.no_grad()
@pytest.mark.parametrize("one", [False, True])
def test_extra_keys(subject: Subject, one: bool) -> None:
    """Every query of the rule's heads sees them, whatever the model's mask; no other head does."""
    rule = Explicit(one=one, heads=[1, 3], **where(subject))
    with ab.steer(subject.model, rule):
        found = subject.run()
    eager = subject.eager()
    with by_hand(eager, added([1, 3], one), None, subject.towers):
        wanted = subject.run(eager)
    assert off(found, wanted) < RELATIVE
    assert off(subject.run(), wanted) > 30 * RELATIVE


def added(heads: list[int], one: bool = False) -> Change:
    def change(call: Parts) -> None:
        key, value = extras(heads, 2, call.query.shape[-1], call.value.shape[-1])
        if one:
            key, value = (t[:, :1].expand(-1, len(heads), -1, -1) for t in (key, value))
        count = call.query.shape[1]
        call.extra_key = torch.zeros(1, count, 2, key.shape[-1], dtype=torch.double)
        call.extra_value = torch.zeros(1, count, 2, value.shape[-1], dtype=torch.double)
        # A head that does not see them: a key infinitely far from every query.
        call.extra_key[:, heads], call.extra_value[:, heads] = key, value
        rest = [head for head in range(count) if head not in heads]
        own = call.map

        def masked() -> Tensor:
            kept = call.extra_key
            call.extra_key = None
            plain = own()
            call.extra_key = kept
            found = own()
            found[:, rest] = torch.nn.functional.pad(plain[:, rest], (0, 2))
            return found

        call.map = masked  # type: ignore[method-assign]

    return change


@torch.no_grad()
def test_extra_keys_beside_biases_and_new_shares(subject: Subject) -> None:
    """A bias does not shift them, and a reallocation leaves them their share."""
    rules = (
        Explicit(heads=[1, 3], **where(subject)),
        KeyShift(keys=[2], amount=1.5, heads=[1, 2], **where(subject)),
        SetShare(keys=[2, 4], share=0.6, heads=[2, 3], **where(subject)),
    )
    with ab.steer(subject.model, *rules):
        found = subject.run()

    def change(call: Parts) -> None:
        count, keys = call.query.shape[1], call.key.shape[2]
        added([1, 3])(call)
        bias = torch.zeros(1, count, 1, keys, dtype=torch.double)
        bias[:, [1, 2], :, 2] = 1.5
        chosen = torch.zeros(keys, dtype=torch.bool)
        chosen[[2, 4]] = True
        call.bias, call.share = bias, (chosen, 0.6, [2, 3])

    eager = subject.eager()
    with by_hand(eager, change, None, subject.towers):
        wanted = subject.run(eager)
    assert off(found, wanted) < RELATIVE
    with ab.steer(subject.model, *rules[1:]):
        assert off(subject.run(), wanted) > 30 * RELATIVE


@torch.no_grad()
@pytest.mark.parametrize("kind", ["turn", "extra", "scale"])
def test_edits_of_vectors_and_outputs_meet_every_cache(decoder: Subject, kind: str) -> None:
    from transformers import DynamicCache, StaticCache

    rule: Rule = {
        "turn": Turn(parts=("query",), factor=2.0, heads=[0, 3]),
        "extra": Explicit(heads=[0, 3]),
        "scale": Scale(factor=3.0, keys=(2, 7, 12), heads=[0, 3]),
    }[kind]
    if kind == "turn":  # the same at every place of a chunk

        @dataclass(frozen=True, kw_only=True)
        class Even(Rule):
            def vectors(self, site: SiteCall) -> Vectors | None:
                return Vectors(query=site.query * 2, key=site.key * 0.7, value=site.value - 0.2)

        rule = Even(heads=[0, 3])
    ids = decoder.inputs["input_ids"]
    with ab.steer(decoder.model, rule):
        wanted = decoder.run(use_cache=False)
        for sizes in ([13], [5, 3, 5], [4] + [1] * 9):
            for cache in (
                DynamicCache(config=decoder.model.config),
                StaticCache(config=decoder.model.config, max_cache_len=24),
            ):
                parts = [
                    decoder.model(input_ids=part, past_key_values=cache, use_cache=True).logits
                    for part in ids.split(sizes, 1)
                ]
                assert off(torch.cat(parts, 1), wanted) < RELATIVE
    assert off(decoder.run(use_cache=False), wanted) > 30 * RELATIVE


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["stories", "minilm", "mistral", "gpt_oss"])
def test_rows_of_a_padded_batch(name: str, side: str, request: pytest.FixtureRequest) -> None:
    subject = make(name, request)
    inputs, _, rows = padded(subject, side)
    rules = (Explicit(heads=[0, 1]), Scale(factor=2.0, keys=(1, 5), heads=[1, 3]))
    with ab.steer(subject.model, *rules):
        found = subject.run(**inputs)
        for row, part in enumerate(rows):
            alone = subject.model(input_ids=inputs["input_ids"][row : row + 1, part])
            single = alone.logits if hasattr(alone, "logits") else alone.last_hidden_state
            assert off(found[row, part], single[0]) < RELATIVE


def test_gradients_through_vectors_and_extra_keys(decoder: Subject) -> None:
    """Gradients to the weights, and to what a rule adds."""
    rules = (
        Turn(parts=("query", "key", "value"), heads=[0, 3]),
        Explicit(heads=[0, 3]),
        Scale(factor=2.0, heads=[1]),
    )

    def change(call: Parts) -> None:
        for part in ("query", "key", "value"):
            old = getattr(call, part).clone()
            old[:, [0, 3]] = turned(old[:, [0, 3]], (0, 3), 1.5)
            setattr(call, part, old)
        added([0, 3])(call)

    def after(out: Tensor) -> Tensor:
        return torch.cat([out[:, :1], out[:, 1:2] * 2, out[:, 2:]], 1)

    eager, grads = decoder.eager(), []
    for model in (decoder.model, eager):
        context: Any = (
            by_hand(eager, change, after=after) if model is eager else ab.steer(model, *rules)
        )
        with context:
            decoder.run(model).square().mean().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    size = max(float(g.abs().max()) for g in grads[1].values())
    assert grads[0].keys() == grads[1].keys()
    assert max(float((grads[0][n] - g).abs().max()) for n, g in grads[1].items()) < 2e-4 * size


@torch.no_grad()
@pytest.mark.parametrize("name", ["mistral", "gpt_oss"])
def test_half_precision(name: str, request: pytest.FixtureRequest) -> None:
    subject = make(name, request)
    rules = (Explicit(heads=[0, 3]), Turn(parts=("query", "value"), heads=[0, 1]))
    with ab.steer(subject.model, *rules):
        wanted = subject.run()
    plain = subject.run()
    subject.model.bfloat16()
    with ab.steer(subject.model, *rules):
        found = subject.run()
    assert found.dtype == torch.bfloat16
    assert off(found.float(), wanted) < 0.1 < off(plain, wanted)


# Outputs ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_outputs(subject: Subject) -> None:
    """At chosen positions, after biases and vectors, in the order of the rules."""
    rules = (
        Scale(factor=-2.0, keys=(1, 3), heads=[0, 3], **where(subject)),
        Turn(parts=("value",), heads=[3], **where(subject)),
        KeyShift(keys=[2], amount=2.0, heads=[0, 3], **where(subject)),
        Scale(factor=0.5, keys=(3, 4), heads=[3], **where(subject)),
    )
    with ab.steer(subject.model, *rules):
        found = subject.run()

    def change(call: Parts) -> None:
        value = call.value.clone()
        value[:, [3]] = turned(value[:, [3]], (3,), 1.5)
        bias = torch.zeros(1, call.query.shape[1], 1, call.key.shape[2], dtype=torch.double)
        bias[:, [0, 3], :, 2] = 2.0
        call.value, call.bias = value, bias

    def after(out: Tensor) -> Tensor:
        factor = torch.ones(out.shape[1:3], dtype=torch.double)
        factor[0, [1, 3]] = -2.0
        factor[3, [1, 3]] = -2.0
        factor[3, [3, 4]] *= 0.5
        return out * factor[..., None]

    eager = subject.eager()
    with by_hand(eager, change, None, subject.towers, after):
        wanted = subject.run(eager)
    assert off(found, wanted) < RELATIVE
    assert off(subject.run(), wanted) > 30 * RELATIVE


@torch.no_grad()
def test_other_heads_and_queries_keep_their_outputs(subject: Subject) -> None:
    from attnbias.hub import attach
    from tests.cases.rule import Watch

    checked: list[int] = []

    def look(call: Any, extra: Any, output: Tensor) -> None:
        if subject.towers is not None and call.site.tower not in subject.towers:
            return
        plain = call.plain()
        same = (output == plain).all(-1).all(0)  # (queries, heads)
        wanted = torch.ones_like(same)
        wanted[[2, 5], 1] = False
        assert torch.equal(same, wanted)
        checked.append(call.site.layer)

    rule = Scale(factor=2.0, keys=(2, 5), heads=[1], **where(subject))
    with ab.steer(subject.model, rule), attach(subject.model, Watch(look)):
        subject.run()
    assert checked


# Looking ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_maps_scores_and_received(subject: Subject) -> None:
    """What a site tells is the float64 map under everything that acts at the call."""
    told: list[dict[str, Tensor]] = []

    def make_(site: SiteCall) -> int:
        rows = torch.tensor([[5, 0], [2, 3]])
        told.append(
            {
                "scores": site.scores(),
                "map": site.attention(),
                "some": site.attention(rows),
                "part": site.attention(slice(2, 4)),
                "few": site.scores(rows),
                "received": site.received(),
                "seen": site.seen_by().expand(2, len(site.heads), -1),
                "value": site.value,
            }
        )
        return site.site.layer

    rules = (
        Turn(parts=("query", "key"), heads=[0, 1], **where(subject)),
        KeyShift(keys=[2], amount=1.5, heads=[1, 2], **where(subject)),
        SetShare(keys=[2, 4], share=0.6, heads=[2, 3], **where(subject)),
        Watcher(make=make_, heads=[1, 2, 3], **where(subject)),
    )
    with ab.steer(subject.model, *rules):
        subject.run()

    def change(call: Parts) -> None:
        for part in ("query", "key"):
            old = getattr(call, part).clone()
            old[:, [0, 1]] = turned(old[:, [0, 1]], (0, 1), 1.5)
            setattr(call, part, old)
        bias = torch.zeros(1, call.query.shape[1], 1, call.key.shape[2], dtype=torch.double)
        bias[:, [1, 2], :, 2] = 1.5
        chosen = torch.zeros(call.key.shape[2], dtype=torch.bool)
        chosen[[2, 4]] = True
        call.bias, call.share = bias, (chosen, 0.6, [2, 3])

    eager, seen = subject.eager(), []
    with by_hand(eager, change, None, subject.towers, seen=seen):
        subject.run(eager)
    assert len(told) == len(seen)
    close = {"atol": 2e-5, "rtol": 1e-4, "check_dtype": False}
    for one, parts in zip(told, seen, strict=True):
        whole = parts.map()[:, [1, 2, 3]]
        torch.testing.assert_close(one["map"], whole, **close)
        torch.testing.assert_close(one["part"], whole[:, :, 2:4], **close)
        some = torch.stack([whole[0][:, [5, 0]], whole[1][:, [2, 3]]])
        torch.testing.assert_close(one["some"], some, **close)
        scores = parts.query @ parts.key.mT * parts.scale + parts.mask
        scores = scores.expand(2, -1, -1, -1)[:, [1, 2, 3]]
        torch.testing.assert_close(one["scores"], scores, **close)
        few = torch.stack([scores[0][:, [5, 0]], scores[1][:, [2, 3]]])
        torch.testing.assert_close(one["few"], few, **close)
        torch.testing.assert_close(one["received"], whole.sum(2), **close)
        count = (parts.mask > -torch.inf).sum(2).expand(2, 3, -1)
        torch.testing.assert_close(one["seen"], count, check_dtype=False)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["stories", "minilm", "mistral", "gpt_oss"])
def test_received_counts_real_queries_alone(
    name: str, side: str, request: pytest.FixtureRequest
) -> None:
    subject = make(name, request)
    inputs, positions, rows = padded(subject, side)

    def run(**given: Any) -> dict[str, Any]:
        found: list[Any] = []

        def make_(site: SiteCall) -> int:
            found.append((site.received(), site.seen_by(), site.last, site.attention()))
            return 0

        with ab.steer(subject.model, Watcher(make=make_, heads=[0, 3], layers=[1])):
            subject.run(**given) if given else None
        return dict(enumerate(found[0]))

    whole = run(**inputs)
    for row, part in enumerate(rows):
        alone = run(input_ids=inputs["input_ids"][row : row + 1, part], attention_mask=None)
        for number in (0, 1):
            found = whole[number].expand(2, -1, -1)[row, :, part].double()
            torch.testing.assert_close(found, alone[number][0].double(), atol=1e-5, rtol=1e-4)
        assert int(whole[2][row]) == int(positions[row].argmax())
        torch.testing.assert_close(whole[3][row, :, part, part], alone[3][0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_what_is_told_while_decoding(decoder: Subject) -> None:
    """Chunks and steps with each cache tell the rows of one pass; unwritten slots get nothing."""
    from transformers import DynamicCache, StaticCache

    ids = decoder.inputs["input_ids"]
    rules = (KeyShift(keys=[9], amount=1.0, heads=[1, 3]), Explicit(heads=[3]))

    def run(cache: Any, sizes: list[int]) -> list[tuple[int, Tensor, Tensor, Tensor]]:
        found: list[Any] = []

        def make_(site: SiteCall) -> int:
            found.append((site.past, site.attention(), site.key_positions, site.scores()))
            return 0

        watcher = Watcher(make=make_, heads=[1, 3], layers=[1])
        with ab.steer(decoder.model, *rules, watcher):
            for part in ids.split(sizes, 1):
                decoder.model(input_ids=part, past_key_values=cache, use_cache=True)
        return found

    whole = run(DynamicCache(config=decoder.model.config), [13])[0][1]
    for sizes in ([5, 3, 5], [4] + [1] * 9):
        for cache in (
            DynamicCache(config=decoder.model.config),
            StaticCache(config=decoder.model.config, max_cache_len=24),
        ):
            start = 0
            for (_, part, keys, scores), size in zip(run(cache, sizes), sizes, strict=True):
                real = keys[0] >= 0
                assert float(part[..., ~real].abs().sum()) == 0.0
                assert bool((scores[..., ~real] == -torch.inf).all())
                wanted = whole[:, :, start : start + size][..., keys[0][real]]
                torch.testing.assert_close(part[..., real], wanted, atol=1e-5, rtol=1e-4)
                start += size


@torch.no_grad()
def test_each_hook_sees_the_edits_before_it(request: pytest.FixtureRequest) -> None:
    subject = make("gpt_oss", request)
    maps: dict[str, Tensor] = {}

    @dataclass(frozen=True, kw_only=True)
    class Asks(Rule):
        name: str

        def vectors(self, site: SiteCall) -> Vectors | None:
            maps[f"{self.name} vectors"] = site.attention()
            return Vectors(query=site.query * 1.5)

        def bias(self, site: SiteCall) -> Bias | None:
            maps[f"{self.name} bias"] = site.attention()
            weight = torch.zeros(site.shape[3])
            weight[9 if self.name == "a" else 11] = 2.0
            return KeyBias(weight)

        def groups(self, site: SiteCall) -> Tensor:
            return (torch.arange(site.shape[3]) == 10).long()[None, None]

        def reallocate(self, site: SiteCall, masses: Tensor) -> Tensor | None:
            maps[f"{self.name} reallocate"] = site.attention()
            told = site.attention()[..., 10]
            torch.testing.assert_close(masses[..., 1], told, atol=1e-5, rtol=1e-4)
            half = masses[..., 1] / 2
            new = torch.stack([masses[..., 0] + half, half], -1)
            return torch.where((masses > 0).all(-1, keepdim=True), new, masses)

        def outputs(self, site: SiteCall, out: Tensor) -> Tensor | None:
            maps[f"{self.name} outputs"] = site.attention()
            return out * 2

        def look(self, site: SiteCall) -> Any:
            maps[f"{self.name} look"] = site.attention()

    with ab.steer(subject.model, *(Asks(name=name, heads=[1], layers=[1]) for name in "ab")):
        subject.run()
    seen = [
        ["a vectors"],
        ["b vectors"],
        ["a bias"],
        ["b bias"],
        ["a reallocate"],
        ["b reallocate"],
        ["a outputs", "b outputs", "a look", "b look"],
    ]
    assert list(maps) == [name for group in seen for name in group]
    for before, after in itertools.pairwise(seen):
        # "a bias" comes after both vectors; every other hook changes the map before the next.
        assert not torch.allclose(maps[before[0]], maps[after[0]], atol=1e-5), (before, after)
    last = [maps[name] for name in seen[-1]]
    assert all(torch.equal(one, last[0]) for one in last)


@torch.no_grad()
def test_looked_lasts_one_forward_and_belongs_to_one_rule(request: pytest.FixtureRequest) -> None:
    subject = make("mistral", request)
    sizes: list[tuple[int, int]] = []

    def count(number: int) -> Callable[[SiteCall], Any]:
        def make_(site: SiteCall) -> Any:
            sizes.append((number, len(site.looked)))
            assert all(value == number for value in site.looked.values())
            assert all(at.layer < site.site.layer for at in site.looked)
            return number if site.site.layer != 1 else None  # None is not kept

        return make_

    one, two = (Watcher(make=count(number), heads="all") for number in (1, 2))
    with ab.steer(subject.model, one, two):
        subject.run()
        subject.run()
    assert sizes == [(1, 0), (2, 0), (1, 1), (2, 1), (1, 1), (2, 1)] * 2


@torch.no_grad()
def test_a_tower_that_runs_first_is_still_known(request: pytest.FixtureRequest) -> None:
    """An image's features by a call of their own: known to the forward that reads them."""
    subject = make("llava", request)
    known: list[int] = []

    def make_(site: SiteCall) -> Any:
        if site.site.tower == "vision":
            return site.site.layer
        if site.site.layer == 0:
            known.append(len(site.looked))
        return None

    rule = Watcher(make=make_, heads="all", towers=("vision", "text"))
    text = {"input_ids": tokens(2, 6)}
    with ab.steer(subject.model, rule):
        subject.run()
        subject.model(**text)
        subject.model.get_image_features(pixel_values=subject.inputs["pixel_values"])
        subject.model(**text)
        subject.model(**text)
        subject.model.generate(**subject.inputs, max_new_tokens=3, do_sample=False)
    layers = subject.model.config.vision_config.num_hidden_layers
    assert known[:4] == [layers, 0, layers, 0]
    assert known[4:] == [layers, 0, 0]


# What is kept -------------------------------------------------------------------------------------


@torch.no_grad()
def test_frozen_belongs_to_a_prompt(request: pytest.FixtureRequest) -> None:
    from transformers import DynamicCache

    subject = make("stories", request)
    ids, log = subject.inputs["input_ids"], []
    decide: list[Any] = []

    @dataclass(frozen=True, kw_only=True)
    class Keeps(Rule):
        def look(self, site: SiteCall) -> Any:
            log.append((site.site.layer, site.frozen("it", lambda: decide[0])))

    def run(model: Any, cache: Any, *sizes: int) -> None:
        start = cache.get_seq_length()
        for size in sizes:
            model(input_ids=ids[:, start : start + size], past_key_values=cache)
            start += size

    rule = Keeps(heads="all", layers=[0, 2])
    with ab.steer(subject.model, rule):
        decide[:] = ["first"]
        cache = DynamicCache()
        run(subject.model, cache, 4, 1, 1)
        decide[:] = [None]  # nothing new in this part of the prompt
        run(subject.model, cache, 3)
        decide[:] = ["second"]
        run(subject.model, cache, 2, 1)
        assert [value for layer, value in log if layer == 0] == ["first"] * 4 + ["second"] * 2
        assert [layer for layer, _ in log] == [0, 2] * 6
        decide[:] = [None]  # another text forgets
        with pytest.raises(ab.Refused, match="run the prefill inside the context"):
            run(subject.model, DynamicCache(), 4)
    cache = DynamicCache()
    run(subject.model, cache, 4)
    with (
        ab.steer(subject.model, rule),
        pytest.raises(ab.Refused, match="run the prefill inside the context"),
    ):
        run(subject.model, cache, 1)


@torch.no_grad()
def test_grown_keeps_a_choice_of_keys(request: pytest.FixtureRequest) -> None:
    subject = make("mistral", request)
    seen: list[Tensor] = []

    @dataclass(frozen=True, kw_only=True)
    class Chooses(Rule):
        def bias(self, site: SiteCall) -> Bias | None:
            chosen = site.frozen("keys", lambda: site.where((1, 3)).clone())
            kept = site.grown(chosen)
            seen.append(kept)
            return KeyBias(kept.float()[:, None])

    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with ab.steer(subject.model, Chooses(heads="all", layers=[0])):
        subject.model.generate(**subject.inputs, **options, cache_implementation=None)
    assert seen[0].shape[-1] == 13
    for kept in seen:
        assert kept.sum() <= 2


@torch.no_grad()
def test_the_sink_of_a_layer(request: pytest.FixtureRequest) -> None:
    told: list[Any] = []
    for name in ("gpt_oss", "mistral"):
        subject = make(name, request)
        rule = Watcher(make=lambda site: told.append(site.sink), heads=[3, 1], layers=[1])
        with ab.steer(subject.model, rule):
            subject.run()
        if name == "gpt_oss":
            assert torch.equal(told[0], subject.model.model.layers[1].self_attn.sinks[[1, 3]])
    assert told[1] is None


# Observers, errors, restoring ---------------------------------------------------------------------


@torch.no_grad()
def test_observers_see_edited_vectors(subject: Subject) -> None:
    rule = Turn(parts=("query", "key"), heads=[0, 3], **where(subject))
    with (
        ab.steer(subject.model, rule),
        ab.observe(subject.model, [ab.statistics.Received()]) as seen,
    ):
        subject.run()

    def change(call: Parts) -> None:
        for part in ("query", "key"):
            old = getattr(call, part).clone()
            old[:, [0, 3]] = turned(old[:, [0, 3]], (0, 3), 1.5)
            setattr(call, part, old)

    eager, parts = subject.eager(), []
    with by_hand(eager, change, None, subject.towers, seen=parts):
        subject.run(eager)
    tower = "text" if subject.towers is None else subject.towers[0]
    tower = "vision" if subject.name == "vit" else tower
    found = seen.tensor("received", tower=tower) if subject.towers else seen.tensor("received")
    wanted = torch.stack([one.map().sum(2) for one in parts])
    values = getattr(found, "values", found)
    values = values() if callable(values) else values
    values = torch.as_tensor(values)[..., : wanted.shape[-1]]
    assert values.numel() % wanted.numel() == 0
    torch.testing.assert_close(
        values.reshape(-1).double().sort().values[-50:],
        (wanted if values.numel() == wanted.numel() else wanted.mean(1))
        .reshape(-1)
        .sort()
        .values[-50:],
        atol=1e-4,
        rtol=1e-3,
    )


@torch.no_grad()
def test_observers_are_refused_where_a_rule_adds_keys(request: pytest.FixtureRequest) -> None:
    subject = make("mistral", request)
    with (
        pytest.raises(ab.Refused, match="keys that a rule adds"),
        ab.steer(subject.model, Explicit(heads=[0])),
        ab.observe(subject.model, [ab.statistics.Received()]),
    ):
        subject.run()
    rule = Watcher(make=lambda site: site.received(), heads=[1])
    with (
        pytest.raises(ab.Refused, match="keys that a rule adds"),
        ab.steer(subject.model, Explicit(heads=[0]), rule),
    ):
        subject.run()


@pytest.mark.parametrize(
    ("hook", "value", "words"),
    [
        ("vectors", 3, "vectors must return Vectors or None, got int"),
        ("vectors", Vectors(query=torch.zeros(1)), r"vectors: query must have the shape"),
        ("vectors", Vectors(key=torch.zeros(2, 1, 13, 8)), "vectors: key must have the shape"),
        ("vectors", Vectors(value="v"), "vectors: value must have the shape .* got str"),
        (
            "vectors",
            Vectors(extra_key=torch.zeros(1, 3, 1, 8), extra_value=torch.zeros(1, 3, 1, 8)),
            "extra_key must fit",
        ),
        (
            "vectors",
            Vectors(extra_key=torch.zeros(1, 1, 1, 8), extra_value=torch.zeros(1, 1, 2, 8)),
            "extra_value must fit",
        ),
        ("outputs", torch.zeros(2, 2, 13), "outputs must return the shape"),
        ("outputs", "no", "outputs must return the shape .* got str"),
    ],
)
@torch.no_grad()
def test_what_hooks_return_is_checked(
    hook: str, value: Any, words: str, request: pytest.FixtureRequest
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Wrong(Rule):
        pass

    setattr(Wrong, hook, lambda self, *rest: value)
    subject = make("mistral", request)
    plain = subject.run()
    with pytest.raises(ab.AttnbiasError, match=words), ab.steer(subject.model, Wrong(heads=[0, 1])):
        subject.run()
    assert torch.equal(subject.run(), plain)


def test_extra_keys_and_values_come_together() -> None:
    with pytest.raises(ab.AttnbiasError, match="extra_key and extra_value together"):
        Vectors(extra_key=torch.zeros(1, 1, 1, 8))


@torch.no_grad()
@pytest.mark.parametrize("hook", ["vectors", "bias", "outputs", "look"])
def test_an_exception_in_a_hook_leaves_the_plain_model(
    hook: str, request: pytest.FixtureRequest
) -> None:
    subject = make("gpt_oss", request)
    plain = subject.run()

    @dataclass(frozen=True, kw_only=True)
    class Fails(Rule):
        pass

    def fail(self: Any, site: SiteCall, *rest: Any) -> Any:
        if site.site.layer == 1:
            raise RuntimeError("in the hook")

    setattr(Fails, hook, fail)
    rules = (Turn(parts=("query",), heads=[0]), Scale(factor=2.0, heads=[1]))
    with (
        pytest.raises(RuntimeError, match="in the hook"),
        ab.steer(subject.model, *rules),
        ab.steer(subject.model, Fails(heads="all")),
    ):
        subject.run()
    assert torch.equal(subject.run(), plain)
    with ab.steer(subject.model, *rules):
        assert not torch.equal(subject.run(), plain)


def test_dropout_in_training_is_refused_for_outputs_too(request: pytest.FixtureRequest) -> None:
    subject = make("mistral", request)
    subject.model.train()
    for layer in subject.model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    for rule in (Scale(factor=2.0, heads=[0]), Explicit(heads=[0])):
        with pytest.raises(ab.Refused, match=r"dropout 0\.1"), ab.steer(subject.model, rule):
            subject.run()
