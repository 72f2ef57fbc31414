"""ALFAR, AVISC, DeCoRe, DAGCD and VHR beside plain PyTorch, row by row."""

from __future__ import annotations

import contextlib
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

import attnbias as ab
from tests.cases.hook import HookCase
from tests.steer.answering import (
    EXTRA,
    Tap,
    answering,
    last_scores,
    one_row,
    prefix,
    tapped,
    without,
)
from tests.steer.models import VLMS, Subject

IMAGE, QUESTION, CONTEXT = (2, 6), (6, 7), (7, 9)
FLOOR = 1e-30  # a mask that hides nothing: infinities cannot be compared


class BranchCase(HookCase):
    """The inherited case of rules on next-token scores: one-shot scores, so no chunks in it."""

    subjects: ClassVar[tuple[str, ...]] = ("stories", "mistral")
    padding: ClassVar[tuple[str, ...]] = ("stories",)
    caches: ClassVar[tuple[str, ...]] = ()
    generates: ClassVar[tuple[str, ...]] = ("stories", "mistral")
    kind: ClassVar[Any]
    heads: ClassVar[Any] = "all"

    def rule(self, strength: Any, **where: Any) -> Any:
        return self.kind(**{"heads": self.heads, **strength, **where})

    def spans(self, subject: Subject) -> dict[str, Any]:
        return {"image": IMAGE, "question": QUESTION, "document 0": CONTEXT}

    def scores(
        self, model: Any, rule: Any, plain: Any, inputs: dict[str, Tensor], prompt: int
    ) -> Tensor:
        raise NotImplementedError

    def oracle(
        self, subject: Subject, strength: Any, model: Any
    ) -> contextlib.AbstractContextManager[Any]:
        rule = self.rule(strength)

        def scores(plain: Any, inputs: dict[str, Tensor], prompt: int) -> Tensor:
            return self.scores(model, rule, plain, inputs, prompt)

        return answering(model, scores, subject.shares)


def span(where: tuple[int, int]) -> slice:
    return slice(*where)


class TestALFAR(BranchCase):
    __test__ = True
    kind = ab.rules.ALFAR
    zero: ClassVar[Any] = {"strength": 0.0, "fusion": False}
    small: ClassVar[Any] = {"form": "paper", "similarity": 0.9, "plausibility": FLOOR}
    large: ClassVar[Any] = {"strength": 2.0, "plausibility": FLOOR, "keep_scale": True}
    subjects: ClassVar[tuple[str, ...]] = ("stories", "mistral", *VLMS)

    def scores(
        self, model: Any, rule: Any, plain: Any, inputs: dict[str, Tensor], prompt: int
    ) -> Tensor:
        def edit(layer: int, scores: Tensor) -> Tensor:
            shown = scores > -1e30
            asked = scores[:, :, span(CONTEXT), span(QUESTION)].sum(-1)
            weights = asked.softmax(-1)[:, :, None]
            new = scores.clone()
            rows = slice(prompt - 1, None)
            size = scores.abs() if rule.form == "magnitude" else scores
            k, s = rule.strength, rule.similarity
            if rule.form == "share":
                new[:, :, rows, span(IMAGE)] += math.log(1 - k * s)
                new[:, :, rows, span(CONTEXT)] += (1 + k * weights).log()
            else:
                new[:, :, rows, span(IMAGE)] -= k * s * size[:, :, rows, span(IMAGE)]
                new[:, :, rows, span(CONTEXT)] += k * weights * size[:, :, rows, span(CONTEXT)]
            return torch.where(shown, new, scores)

        with tapped(model, Tap(edit)) as tap:
            told = last_scores(plain, inputs)
        if not rule.fusion:
            return told
        row = tap.maps[max(tap.maps)][0, :, -1].mean(0)
        ratio = float(row[span(IMAGE)].sum() / row[span(CONTEXT)].sum())
        if min(row[span(IMAGE)].sum(), row[span(CONTEXT)].sum()) < 1e-6:
            return told
        with tapped(model, Tap()):
            bare = last_scores(plain, without(inputs, CONTEXT))
        fused = (1 + 1 / ratio) * told - (1 - ratio) * bare
        if rule.keep_scale:
            fused = fused / (ratio + 1 / ratio)
        return fused.masked_fill(told < told.max() + math.log(rule.plausibility), -math.inf)


class TestALFARShare(TestALFAR):
    small: ClassVar[Any] = {"form": "share", "plausibility": FLOOR, "similarity": (0.5,)}
    large: ClassVar[Any] = {"form": "share", "strength": 0.9, "fusion": False}
    subjects: ClassVar[tuple[str, ...]] = ("stories",)
    generates: ClassVar[tuple[str, ...]] = ()

    def oracle(self, subject: Subject, strength: Any, model: Any) -> Any:
        one = {name: v[0] if isinstance(v, tuple) else v for name, v in strength.items()}
        return super().oracle(subject, one, model)


class TestAVISC(BranchCase):
    __test__ = True
    kind = ab.rules.AVISC
    zero: ClassVar[Any] = {"strength": 0.0}
    small: ClassVar[Any] = {"strength": 0.5, "plausibility": FLOOR}
    large: ClassVar[Any] = {"deviations": 0.0, "share": 0.8, "plausibility": FLOOR}
    subjects: ClassVar[tuple[str, ...]] = ("stories", *VLMS)
    generates: ClassVar[tuple[str, ...]] = ("stories",)

    def scores(
        self, model: Any, rule: Any, plain: Any, inputs: dict[str, Tensor], prompt: int
    ) -> Tensor:
        with tapped(model, Tap()):
            base = last_scores(plain, inputs)
        first = prefix(inputs, prompt)
        with tapped(model, Tap()) as tap:
            last_scores(plain, first)
        rows = [tap.maps[n][0, :, prompt - 1].mean(0)[span(IMAGE)] for n in sorted(tap.maps)]
        shares = torch.stack([row.sum() for row in rows])
        order = sorted(range(len(rows)), key=lambda n: -float(shares[n]))
        kept: list[int] = []
        total = 0.0
        while total < rule.share and len(kept) < len(rows):
            kept.append(order[len(kept)])
            total += float(shares[kept[-1]] / shares.sum())
        mean = torch.stack([rows[n] for n in kept]).mean(0)
        blind = mean >= mean.mean() + rule.deviations * mean.std()

        def empty(module: Any, args: Any, given: dict[str, Any]) -> Any:
            embeds = given.get("inputs_embeds")
            if embeds is None:
                embeds = model.get_input_embeddings()(given["input_ids"])
            embeds = embeds.clone()
            embeds[:, span(IMAGE)] *= blind[:, None]
            return args, {**given, "input_ids": None, "inputs_embeds": embeds}

        decoder = getattr(model.model, "language_model", model.model)
        hook = decoder.register_forward_pre_hook(empty, with_kwargs=True)
        with tapped(model, Tap()):
            other = last_scores(plain, inputs)
        hook.remove()
        mixed = (1 + rule.strength) * base - rule.strength * other
        result: Tensor = mixed.masked_fill(
            base < base.max() + math.log(rule.plausibility), -math.inf
        )
        return result


class TestDeCoRe(BranchCase):
    __test__ = True
    kind = ab.rules.DeCoRe
    heads = ((0, 1), (1, 0), (1, 3), (2, 2))
    zero: ClassVar[Any] = {"strength": 0.0}
    small: ClassVar[Any] = {"strength": 0.5, "mode": "zero"}
    large: ClassVar[Any] = {"most": 6.0}
    subjects: ClassVar[tuple[str, ...]] = ("stories", "mistral", *VLMS)

    def scores(
        self, model: Any, rule: Any, plain: Any, inputs: dict[str, Tensor], prompt: int
    ) -> Tensor:
        def uniform(layer: int, scores: Tensor) -> Tensor:
            new = scores.clone()
            for head in [h for number, h in rule.heads if number == layer]:
                part = new[:, head, prompt - 1 :]
                new[:, head, prompt - 1 :] = torch.where(part > -1e30, 0.0, part)
            return new

        def nothing(layer: int, outputs: Tensor) -> Tensor:
            new = outputs.clone()
            for head in [h for number, h in rule.heads if number == layer]:
                new[:, head, prompt - 1 :] = 0
            return new

        with tapped(model, Tap()):
            base = last_scores(plain, inputs).log_softmax(-1)
        with tapped(model, Tap(uniform) if rule.mode == "uniform" else Tap(outputs=nothing)):
            other = last_scores(plain, inputs).log_softmax(-1)
        alpha = rule.strength
        if alpha is None:
            alpha = min(float(-(base.exp() * base).sum()), rule.most)
        result: Tensor = (1 + alpha) * base - alpha * other
        return result


class TestDAGCD(BranchCase):
    __test__ = True
    kind = ab.rules.DAGCD
    heads = ((1, 3), (0, 1), (1, 0))
    detector: ClassVar[Any] = {"coefficients": (2.0, 0.5, 1.0), "intercept": -0.2}
    zero: ClassVar[Any] = {"strength": 0.0, **detector}
    small: ClassVar[Any] = {"top_rank": 1000, **detector}
    large: ClassVar[Any] = {"strength": 40.0, "top_rank": 1000, **detector}
    subjects: ClassVar[tuple[str, ...]] = ("stories", *VLMS)
    generates: ClassVar[tuple[str, ...]] = ("stories",)

    def scores(
        self, model: Any, rule: Any, plain: Any, inputs: dict[str, Tensor], prompt: int
    ) -> Tensor:
        with tapped(model, Tap()) as tap:
            scores = last_scores(plain, inputs)
        chances = scores.softmax(-1)
        context = inputs["input_ids"][0, span(CONTEXT)].tolist()
        distinct = sorted(set(context))
        total: dict[int, list[float]] = {}
        for layer, head in rule.heads:
            row = tap.maps[layer][0, head, -1, span(CONTEXT)].tolist()
            means = {
                c: sum(a for a, t in zip(row, context, strict=True) if t == c) / context.count(c)
                for c in distinct
            }
            for c in distinct:
                total.setdefault(c, []).append(means[c] / max(sum(means.values()), 1e-8))
        use = torch.zeros_like(chances)
        for c, found in total.items():
            score = sum(w * a for w, a in zip(rule.coefficients, found, strict=True))
            if score + rule.intercept > 0 and int((chances > chances[c]).sum()) < rule.top_rank:
                use[c] = score
        if float(use.sum()) == 0:
            return scores
        some = chances[chances > 0]
        entropy = float(-(some * some.log()).sum()) / math.log(len(chances))
        new = chances + rule.strength * entropy * use / use.sum()
        result: Tensor = (new / new.sum()).log()
        return result


class TestVHR(BranchCase):
    __test__ = True
    kind = ab.rules.VHR
    zero: ClassVar[Any] = {"strength": 1.0}
    small: ClassVar[Any] = {"strength": 1.2}
    large: ClassVar[Any] = {"strength": 2.0}
    subjects: ClassVar[tuple[str, ...]] = ("stories", *VLMS)
    generates: ClassVar[tuple[str, ...]] = ("stories",)

    def spans(self, subject: Subject) -> dict[str, Any]:
        return {"image": IMAGE}

    def scores(
        self, model: Any, rule: Any, plain: Any, inputs: dict[str, Tensor], prompt: int
    ) -> Tensor:
        first = prefix(inputs, prompt)
        with tapped(model, Tap()) as blank:
            last_scores(plain, without(first, IMAGE, image=IMAGE))
        chosen: dict[int, Tensor] = {}

        def choose(layer: int, outputs: Tensor) -> Tensor:
            bare = blank.outs[layer][0, :, -1]
            own = outputs[0, :, prompt - 1]
            found = (own - bare).square().sum(-1).sqrt()
            # A window that ends after the image leaves rounding alone to choose by.
            found = torch.where(found < 1e-5 * own.square().sum(-1).sqrt(), 0.0, found)
            surge = bare.square().sum(-1)
            high = found > found.mean() + found.std(correction=0)
            high &= surge > surge.mean() + surge.std(correction=0)
            found = torch.where(high, 0.0, found)
            middle = found.sort().values[len(found) // 2 - 1 : len(found) // 2 + 1].mean()
            chosen.setdefault(layer, torch.where(found > middle, rule.strength, 1.0))
            return outputs * chosen[layer][None, :, None, None]

        with tapped(model, Tap(outputs=choose)):
            last_scores(plain, first)
        with tapped(model, Tap(outputs=choose)):
            found: Tensor = plain(**inputs, use_cache=False).logits[0, -1]
        return found

    def oracle(self, subject: Subject, strength: Any, model: Any) -> Any:
        rule = self.rule(strength)

        @contextlib.contextmanager
        def every_token() -> Any:
            """Unlike scores alone, scaled heads change every token's output."""
            plain = model.forward
            kept = model.generation_config.use_cache
            prompts: dict[int, int] = {}

            def forward(input_ids: Tensor, attention_mask: Any = None, **given: Any) -> Any:
                given = {n: v for n, v in given.items() if n in EXTRA}
                out = plain(input_ids=input_ids, attention_mask=attention_mask, **given)
                for row in range(len(input_ids)):
                    keep = torch.ones_like(input_ids[row])
                    keep = (keep if attention_mask is None else attention_mask[row]).bool()
                    every = {"input_ids": input_ids, **given}
                    inputs = one_row(every, row, keep.nonzero()[:, 0], subject.shares)
                    prompt = prompts.setdefault(row, int(keep.sum()))
                    found: list[Tensor] = []

                    def whole(_found: list[Tensor] = found, **some: Any) -> Any:
                        result = plain(**some)
                        _found.append(result.logits[0])
                        return result

                    self.scores(model, rule, whole, inputs, prompt)
                    out.logits[row, keep] = found[-1]
                return out

            model.forward = forward
            model.generation_config.use_cache = False
            try:
                yield
            finally:
                del model.forward
                model.generation_config.use_cache = kept

        return every_token()
