"""What every rule must pass: subclass `RuleCase`; say how to build the rule and its dense form."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.hub import Call, attach
from attnbias.steer.engine import never_skip
from tests.steer.dense import DenseEdit, Map, rewritten
from tests.steer.models import DECODERS, NAMES, VISION, VLMS, Subject, make

RELATIVE = 3e-5  # float32 models beside a float64 map, through all layers


class Watch:
    """Sees every call: what the engine returned beside the plain output of the same call."""

    role = "see"

    def __init__(self, look: Callable[[Call, ab.Bias | None, Tensor], None]) -> None:
        self._look = look

    def begin_forward(self, forward: int) -> None: ...

    def end_forward(self, forward: int) -> None: ...

    def see(self, call: Call, extra: ab.Bias | None, output: Tensor, lse: Tensor | None) -> None:
        self._look(call, extra, output)


def off(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest value wanted."""
    return float(((found - wanted).abs().max() / wanted.abs().max()).detach())


def padded(subject: Subject, side: str) -> tuple[dict[str, Tensor], Tensor, list[slice]]:
    """Inputs whose second row is shorter, key positions, and where the real tokens stand."""
    ids = subject.inputs["input_ids"].clone()
    length, short = ids.shape[1], ids.shape[1] - 4
    keep = torch.ones_like(ids)
    where = slice(length - short, length) if side == "left" else slice(0, short)
    row = ids[1, :short].clone()
    keep[1] = 0
    keep[1, where] = 1
    ids[1] = 0
    ids[1, where] = row
    inputs = {"input_ids": ids, "attention_mask": keep}
    if subject.spans:  # kinds of tokens and pixels go along; positions are the model's own affair
        for name in subject.inputs.keys() - inputs.keys():
            inputs[name] = subject.inputs[name].clone()
            if inputs[name].shape == ids.shape:
                inputs[name][1] = 0
                inputs[name][1, where] = subject.inputs[name][1, :short]
    else:
        inputs["position_ids"] = (keep.cumsum(-1) - 1).clamp(min=0)
    positions = torch.where(keep > 0, keep.cumsum(-1) - 1, -1)
    return inputs, positions, [slice(0, length), where]


class RuleCase:
    """The inherited case (subclasses are collected, this class is not).

    A subclass sets `rule(strength, **where)`, `dense(strength)` (the same edit of a dense map) and
    three strengths. Heads and layers are chosen here.
    """

    __test__: ClassVar[bool] = False
    zero: ClassVar[Any]
    small: ClassVar[Any]
    large: ClassVar[Any]

    def rule(self, strength: Any, **where: Any) -> ab.steer.Rule:
        raise NotImplementedError

    def dense(self, strength: Any) -> Callable[[Map], Tensor]:
        raise NotImplementedError

    # Helpers --------------------------------------------------------------------------------------

    @pytest.fixture(params=NAMES)
    def subject(self, request: pytest.FixtureRequest) -> Subject:
        return make(request.param, request)

    @pytest.fixture(params=(*NAMES, *VISION))
    def every(self, request: pytest.FixtureRequest) -> Subject:
        """Subjects with a vision tower too, for the tests that they can fail on their own."""
        return make(request.param, request)

    @pytest.fixture(params=DECODERS)
    def decoder(self, request: pytest.FixtureRequest) -> Subject:
        return make(request.param, request)

    def where(self, subject: Subject) -> dict[str, Any]:
        return {} if subject.towers is None else {"towers": subject.towers}

    @contextlib.contextmanager
    def oracle(
        self,
        subject: Subject,
        model: Any,
        strength: Any,
        positions: Tensor | None = None,
        **where: Any,
    ) -> Iterator[None]:
        if positions is None:
            length = subject.length or next(iter(subject.inputs.values())).shape[1]
            if subject.name == "vit":
                length = 17
            if subject.name == "bart decoder":
                length = subject.inputs["decoder_input_ids"].shape[1]
            positions = torch.arange(length)[None]
        edit = DenseEdit(self.dense(strength), towers=subject.towers, **where)
        with rewritten(model, [edit], positions):
            yield

    # The case -------------------------------------------------------------------------------------

    @torch.no_grad()
    def test_zero_strength_is_skipped(self, every: Subject) -> None:
        plain = every.run()
        edits: list[ab.Bias | None] = []
        watch = Watch(lambda call, extra, output: edits.append(extra))
        rule = self.rule(self.zero, heads="all", **self.where(every))
        with attach(every.model, watch), ab.steer(every.model, rule):
            found = every.run()
        assert float((found - plain).abs().max()) == 0.0
        assert edits
        assert all(extra is None for extra in edits)

    @torch.no_grad()
    def test_zero_strength_on_the_edited_path(self, subject: Subject) -> None:
        """With the skip off, the edited path computes what the plain path computes."""
        errors: list[float] = []

        def look(call: Call, extra: ab.Bias | None, output: Tensor) -> None:
            if subject.towers is None or call.site.tower in subject.towers:
                assert output is not call.plain()
                size = max(1.0, float(call.plain().abs().max()))
                errors.append(float((output - call.plain()).abs().max()) / size)

        rule = self.rule(self.zero, heads="all", **self.where(subject))
        watch = Watch(look)
        with attach(subject.model, watch), ab.steer(subject.model, rule), never_skip():
            subject.run()
        assert errors
        assert max(errors) <= 2e-6

    @torch.no_grad()
    @pytest.mark.parametrize("strength", ["small", "large"])
    def test_equals_the_dense_rewrite(self, every: Subject, strength: str) -> None:
        value = getattr(self, strength)
        where = {"layers": [0, 1], "heads": [0, 3]}
        plain = every.run()
        with ab.steer(every.model, self.rule(value, **where, **self.where(every))):
            found = every.run()
        eager = every.eager()
        with self.oracle(every, eager, value, **where):
            wanted = every.run(eager)
        assert off(found, wanted) < RELATIVE
        # Leaving the edit out, and editing the wrong head or layer, would be seen.
        assert off(plain, wanted) > 30 * RELATIVE
        for wrong in ({"layers": [0, 1], "heads": [0, 2]}, {"layers": [1], "heads": [0, 3]}):
            with self.oracle(every, eager, value, **wrong):
                assert off(found, every.run(eager)) > 3 * RELATIVE

    @torch.no_grad()
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("name", ["stories", "minilm", "mistral", "gpt_oss", *VLMS])
    def test_padding(self, name: str, side: str, request: pytest.FixtureRequest) -> None:
        subject = make(name, request)
        inputs, positions, rows = padded(subject, side)
        rule = self.rule(self.large, heads="all", **self.where(subject))
        plain = subject.run(**inputs)
        with ab.steer(subject.model, rule):
            found = subject.run(**inputs)
        eager = subject.eager()
        with self.oracle(subject, eager, self.large, positions):
            wanted = subject.run(eager, **inputs)
        for row, part in enumerate(rows):
            assert off(found[row, part], wanted[row, part]) < RELATIVE
            assert off(plain[row, part], wanted[row, part]) > 30 * RELATIVE
            # A row of a batch is what it would be alone, without padding.
            alone = subject.row(row, part, **inputs)
            del alone["attention_mask"]
            with ab.steer(subject.model, rule):
                single = replace(subject, inputs=alone).run()
            assert off(found[row, part], single[0]) < RELATIVE

    @torch.no_grad()
    def test_rows_of_a_batch_do_not_touch_each_other(self, every: Subject) -> None:
        rule = self.rule(self.large, heads="all", **self.where(every))
        with ab.steer(every.model, rule):
            found = every.run()
            assert off(every.run(**every.swapped()).flip(0), found) < RELATIVE
            changed = every.run(**every.changed())
        assert off(changed[0], found[0]) < RELATIVE
        assert off(changed[1], found[1]) > 30 * RELATIVE

    @torch.no_grad()
    def test_untouched_heads_are_plain(self, subject: Subject) -> None:
        """Heads that are not named are the plain output bit for bit, and so are the layers."""
        counted: list[int] = []

        def look(call: Call, extra: ab.Bias | None, output: Tensor) -> None:
            plain = call.plain()
            ours = subject.towers is None or call.site.tower in subject.towers
            if not ours or call.site.layer != 1:
                assert extra is None
                assert torch.equal(output, plain)
                return
            counted.append(call.site.layer)
            assert torch.equal(output[:, :, [0, 2, 3]], plain[:, :, [0, 2, 3]])
            assert not torch.equal(output[:, :, 1], plain[:, :, 1])

        rule = self.rule(self.large, heads={1: [1]}, **self.where(subject))
        with ab.steer(subject.model, rule), attach(subject.model, Watch(look)):
            subject.run()
        assert counted == [1]

    @torch.no_grad()
    def test_the_log_edit_tells_what_was_done(self, subject: Subject) -> None:
        """Attention under the model's bias plus the reported edit is the edited output."""
        counted: list[float] = []

        def look(call: Call, extra: ab.Bias | None, output: Tensor) -> None:
            if extra is None:
                return
            bias = extra if call.bias is None else call.bias + extra
            wanted = ab.attention(
                call.query, call.key, call.value, bias=bias, scale=call.scale, sink=call.sink
            )
            assert isinstance(wanted, Tensor)
            counted.append(off(output, wanted.transpose(1, 2)))

        rule = self.rule(self.large, heads=[0, 3], layers=[0], **self.where(subject))
        with ab.steer(subject.model, rule), attach(subject.model, Watch(look)):
            subject.run()
        assert len(counted) == 1
        assert counted[0] < RELATIVE

    @torch.no_grad()
    def test_chunked_prefill_and_every_cache(self, decoder: Subject) -> None:
        """Chunks, a static cache and decoding step by step give what one pass gives.

        A rule that is not `row_local` gives what the dense rewrite gives in the same steps.
        """
        from transformers import DynamicCache, StaticCache

        ids = decoder.inputs["input_ids"]
        rule = self.rule(self.large, heads="all")
        chunks = {"prefill": [ids.shape[1]], "chunks": [5, 3, 5], "steps": [4] + [1] * 9}
        caches = [
            lambda: DynamicCache(config=decoder.model.config),
            lambda: StaticCache(config=decoder.model.config, max_cache_len=24),
        ]

        def stepped(model: Any, cache: Any, sizes: list[int]) -> Tensor:
            parts, start = [], 0
            for size in sizes:
                part = ids[:, start : start + size]
                out = model(input_ids=part, past_key_values=cache, use_cache=True)
                parts.append(out.logits)
                start += size
            return torch.cat(parts, 1)

        with ab.steer(decoder.model, rule):
            wanted = decoder.run(use_cache=False)
        eager = decoder.eager()
        edit = DenseEdit(self.dense(self.large))
        for name, sizes in chunks.items():
            if not rule.row_local:
                # A whole cache: a sliding one would not tell where its keys stand.
                with rewritten(eager, [edit], lambda keys: torch.arange(keys)[None]):
                    wanted = stepped(eager, DynamicCache(), sizes)
            for cache_of in caches:
                with ab.steer(decoder.model, rule):
                    found = stepped(decoder.model, cache_of(), sizes)
                error = off(found, wanted)
                assert error < RELATIVE, (name, error)
        assert off(decoder.run(use_cache=False), wanted) > 30 * RELATIVE

    @torch.no_grad()
    def test_phases(self, decoder: Subject) -> None:
        """A rule for one phase leaves the other alone."""
        ids = decoder.inputs["input_ids"][:, :6]  # a window of 6 still shows every key

        def two(rule: ab.steer.Rule | None) -> tuple[Tensor, Tensor]:
            context = contextlib.nullcontext() if rule is None else ab.steer(decoder.model, rule)
            with context:
                first = decoder.model(input_ids=ids[:, :-1], use_cache=True)
                second = decoder.model(
                    input_ids=ids[:, -1:], past_key_values=first.past_key_values, use_cache=True
                )
            return first.logits, second.logits

        plain = two(None)
        decode = two(self.rule(self.large, heads="all", phase="decode"))
        prefill = two(self.rule(self.large, heads="all", phase="prefill"))
        both = two(self.rule(self.large, heads="all"))
        assert torch.equal(decode[0], plain[0])
        assert not torch.equal(decode[1], plain[1])
        assert torch.equal(prefill[0], both[0])
        assert not torch.equal(prefill[1], both[1])

    @torch.no_grad()
    def test_generate(self, request: pytest.FixtureRequest) -> None:
        """Greedy tokens, with left padding, are those of the dense rewrite."""
        decoder = make("stories", request)
        inputs, _, _ = padded(decoder, "left")
        del inputs["position_ids"]
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        options |= {"eos_token_id": None}
        plain = decoder.model.generate(**inputs, **options)
        with ab.steer(decoder.model, self.rule(self.large, heads="all")):
            found = decoder.model.generate(**inputs, **options)
            static = decoder.model.generate(
                **inputs, **options, cache_implementation="static", disable_compile=True
            )
        eager = decoder.eager()
        with rewritten(eager, [DenseEdit(self.dense(self.large))]):
            wanted = eager.generate(**inputs, **options)
        assert torch.equal(found, wanted)
        assert torch.equal(static, wanted)
        assert not torch.equal(plain, wanted)

    @torch.no_grad()
    @pytest.mark.parametrize("name", VLMS)
    def test_generate_after_an_image(self, name: str, request: pytest.FixtureRequest) -> None:
        """Greedy tokens, cached, are those of whole forwards of the dense rewrite."""
        subject = make(name, request)
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        plain = subject.model.generate(**subject.inputs, **options)
        rule = self.rule(self.large, heads="all", **self.where(subject))
        with ab.steer(subject.model, rule):
            found = subject.model.generate(**subject.inputs, **options)
        eager, inputs = subject.eager(), dict(subject.inputs)
        if not rule.row_local:  # then the steps matter, and the dense rewrite takes the same ones
            from transformers import DynamicCache

            edit = DenseEdit(self.dense(self.large), towers=subject.towers)
            with rewritten(eager, [edit], lambda keys: torch.arange(keys)[None]):
                wanted = eager.generate(**inputs, **options, past_key_values=DynamicCache())
            assert torch.equal(found, wanted)
            assert not torch.equal(plain, found)
            return
        for _ in range(6):
            places = torch.arange(inputs["input_ids"].shape[1])[None]
            with self.oracle(subject, eager, self.large, places):
                scores = subject.run(eager, **inputs, use_cache=False)[:, -1]
            for kind in inputs.keys() - {"pixel_values", "image_grid_thw"}:
                new = scores.argmax(-1) if kind == "input_ids" else torch.zeros(2).long()
                inputs[kind] = torch.cat([inputs[kind], new[:, None]], 1)
        assert torch.equal(found, inputs["input_ids"])
        assert not torch.equal(plain, found)

    @torch.no_grad()
    def test_restores_on_exit_and_on_exception(self, every: Subject) -> None:
        plain = every.run()
        before = {name: id(value) for name, value in vars(every.model.config).items()}
        rule = self.rule(self.large, heads="all", **self.where(every))
        with ab.steer(every.model, rule):
            every.run()
        assert torch.equal(every.run(), plain)

        def fail(call: Call, extra: ab.Bias | None, output: Tensor) -> None:
            if call.site.layer == 1:
                raise RuntimeError("in the middle")

        with (
            pytest.raises(RuntimeError, match="in the middle"),
            ab.steer(every.model, rule),
            attach(every.model, Watch(fail)),
        ):
            every.run()
        assert torch.equal(every.run(), plain)
        assert {name: id(v) for name, v in vars(every.model.config).items()} == before
        with ab.steer(every.model, rule):
            assert not torch.equal(every.run(), plain)

    def test_gradients(self, subject: Subject) -> None:
        """Training with an edit on: gradients to the weights are those of the dense rewrite."""
        rule = self.rule(self.large, heads=[0, 3], **self.where(subject))
        eager = subject.eager()
        grads = []
        for model in (subject.model, eager):
            context = (
                self.oracle(subject, eager, self.large, heads=[0, 3])
                if model is eager
                else ab.steer(subject.model, rule)
            )
            with context:
                subject.run(model).square().mean().backward()
            grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert grads[0].keys() == grads[1].keys()
        size = max(float(g.abs().max()) for g in grads[1].values())
        worst = max(float((grads[0][n] - g).abs().max()) for n, g in grads[1].items())
        assert worst < 2e-4 * size
        subject.model.zero_grad()
        subject.run().square().mean().backward()
        plain = {n: p.grad for n, p in subject.model.named_parameters() if p.grad is not None}
        assert max(float((plain[n] - g).abs().max()) for n, g in grads[1].items()) > 1e-3 * size

    def test_survives_json(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        kind = type(self.rule(self.small, heads="all"))
        monkeypatch.setitem(ab.steer.recipe.BUILT_IN, kind.__name__, kind)
        rules = (
            self.rule(self.small, heads="all"),
            self.rule(self.large, heads={2: [1, 0], 0: [3]}, phase="decode"),
            self.rule(self.large, heads=[1], layers=[0, 5], towers=["decoder"], phase="prefill"),
        )
        recipe = ab.Recipe(rules, "some/model", "abc123")
        recipe.save(tmp_path / "recipe.json")
        assert ab.Recipe.load(tmp_path / "recipe.json") == recipe
        found = json.loads((tmp_path / "recipe.json").read_text())
        assert found["rules"][0]["rule"] == kind.__name__
        assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]

    def test_heads_must_be_typed(self) -> None:
        with pytest.raises(TypeError, match="heads"):
            self.rule(self.small)
        for wrong in ("some", [], [-1], [True], [(1, 2, 3)], 3, {"1": [2]}, {1: 2}, None):
            with pytest.raises(ab.AttnbiasError, match=r"^heads [^\n]*got[^\n]*$"):
                self.rule(self.small, heads=wrong)

    def test_places_that_are_not_there(self, subject: Subject) -> None:
        model, towers = subject.model, self.where(subject)
        plain = subject.run()
        for where, words in (
            ({"heads": "all", "layers": [77]} | towers, "layer 77, but"),
            ({"heads": {9: [0]}} | towers, "layer 9, but"),
            ({"heads": "all", "towers": ["nose"]}, "the tower 'nose', but"),
        ):
            with (
                pytest.raises(ab.AttnbiasError, match=words),
                ab.steer(model, self.rule(self.small, **where)),
            ):
                pass
        rule = self.rule(self.large, heads=[99], **towers)
        with pytest.raises(ab.AttnbiasError, match="names head 99, but"), ab.steer(model, rule):
            subject.run()
        assert torch.equal(subject.run(), plain)
