"""Groups one by one give what one pass over all keys gives; a decoded token too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.hub import attach
from attnbias.steer import Rule, edit, lines, partial
from tests.cases.rule import Watch
from tests.steer import models

LENGTH = 40


@dataclass(frozen=True, kw_only=True)
class Moved(Rule):
    """A third of the attention on some keys goes to the others; groups by name of a layout."""

    layout: str = "stretch"

    def groups(self, site: Any) -> Tensor:
        n = site.shape[3]
        places = site.key_positions.clamp(min=0)
        found = {
            "stretch": (places >= 5) & (places < 17),
            "two stretches": ((places >= 2) & (places < 6)) | (places >= 30),
            "first": places == 0,
            "holes": (places % 13 == 3),
            "scattered": (places % 2 == 0),
            "own": places < 0,
            "rows differ": (places >= 5) & (places < 17),
            "late": (places >= 5) & (places < 17),
            "mixed": (places % 13 == 3),
            "late holes": (places % 13 == 3),
        }[self.layout]
        found = found.expand(site.shape[0], n)
        if self.layout == "rows differ":
            found = torch.cat([found[:1], found[1:].roll(4, -1)])
        if self.layout == "own":  # each head its own
            heads = torch.tensor(site.heads)[None, :, None]
            return ((places[:, None] + 3 * heads) % 13 == 3).long().expand(site.shape[0], -1, n)
        if self.layout == "mixed":  # and a stretch, where the last group is
            return torch.where((places >= 20) & (places < 29) & ~found, 2, found.long())[:, None]
        return found.long()[:, None]

    def queries(self, site: Any) -> Tensor | None:
        order = torch.arange(site.shape[2])[None]
        return order >= 20 if self.layout.startswith("late") else None

    def group_count(self, site: Any, groups: Tensor) -> int:
        return 3  # the last has no key

    def reallocate(self, site: Any, masses: Tensor) -> Tensor:
        rest, some, none = masses.unbind(-1)
        new = torch.stack([rest + some / 3, some * 2 / 3, none], -1)
        new = torch.where((masses[..., :2] > 0).all(-1, keepdim=True), new, masses)
        chosen = self.queries(site)
        return new if chosen is None else torch.where(chosen[:, None, :, None], new, masses)


@contextmanager
def routes(apart: bool) -> Iterator[list[Any]]:
    """Everything apart, or everything in one pass; the groups that were made."""
    made: list[Any] = []
    real = partial.split

    def watched(*given: Any) -> Any:
        found = real(*given)
        made.append(found)
        return found

    with (
        mock.patch.object(partial, "MANY", 1 if apart else 10**9),
        mock.patch.object(partial, "MANY_OWN", 1 if apart else 10**9),
        mock.patch.object(partial, "HOLES", 4),
        mock.patch.object(lines, "FEW", 0),
        mock.patch("attnbias.steer.reallocating.split", watched),
    ):
        yield made


@torch.no_grad()
@pytest.mark.parametrize(
    "layout", ["stretch", "two stretches", "first", "holes", "own", "rows differ"]
)
@pytest.mark.parametrize("name", ["stories", "gpt_oss", "minilm"])
@pytest.mark.parametrize("heads", ["all", (1, 2)])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_both_routes_agree(
    name: str, layout: str, heads: Any, padding: str, request: pytest.FixtureRequest
) -> None:
    """Grouped heads, sink logits, padding on both sides, a bias per key before."""
    subject = models.make(name, request)
    ids = models.tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    if padding != "none":
        mask[1, slice(0, 7) if padding == "left" else slice(-7, None)] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    rules = (
        ab.rules.KeyShift(keys=(3, 20), amount=1.5, heads=heads),
        Moved(layout=layout, heads=heads),
    )
    found = []
    for apart in (False, True):
        with routes(apart) as made, ab.steer(subject.model, *rules):
            out = subject.model(**inputs)
        found.append(out.logits if hasattr(out, "logits") else out.last_hidden_state)
        # A window in the model, or eager sinks with one: that layer takes one pass.
        assert any(one is not None for one in made) == apart, (name, layout)
    real = mask.bool()
    scale = found[0][real].abs().max()
    assert (found[0] - found[1])[real].abs().max() < 1.5e-5 * scale


@torch.no_grad()
@pytest.mark.parametrize(
    ("layout", "beside"),
    [
        ("holes", True),
        ("own", True),
        ("mixed", True),
        ("stretch", False),
        ("two stretches", False),
        ("rows differ", False),
        ("late", False),
        ("late holes", True),
    ],
)
@pytest.mark.parametrize("heads", ["all", (1, 2)])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_beside_the_plain_output(
    layout: str,
    beside: bool,
    heads: Any,
    padding: str,
    request: pytest.FixtureRequest,
) -> None:
    """Also without the rows that cannot change, and with rows in which the base has little."""
    subject = models.make("stories", request)
    ids = models.tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    if padding != "none":
        mask[1, slice(0, 7) if padding == "left" else slice(-7, None)] = 0
    rule = Moved(layout=layout, heads=heads)
    found: list[Tensor] = []
    plain: list[tuple[Tensor, Tensor]] = []

    def look(call: Any, extra: Any, output: Tensor) -> None:
        if call.site.layer == 0:
            plain.append((output, call.plain_again()))

    for apart in (False, True):
        with (
            mock.patch.object(partial, "PREFIX", 1),
            mock.patch.object(partial, "RUNS", 4 if beside else 8),
            mock.patch.object(partial, "FEW_ROWS", 1),
            routes(apart) as made,
            ab.steer(subject.model, rule),
            attach(subject.model, Watch(look)),
        ):
            found.append(subject.model(input_ids=ids, attention_mask=mask).logits)
    assert all(one is not None and (one.plain is not None) == beside for one in made)
    if layout.startswith("late"):
        assert all(one.first == 20 for one in made)
    real = mask.bool()
    assert (found[0] - found[1])[real].abs().max() < 1.5e-5 * found[0][real].abs().max()
    # What cannot change is the plain output, bit for bit.
    alone = {"own": 0, "stretch": 5, "rows differ": 5, "two stretches": 2}.get(layout, 3)
    alone = 20 if layout.startswith("late") else alone
    assert len(plain) == 2
    for output, own in plain:
        assert torch.equal(output[0, :alone], own[0, :alone])
        assert not torch.equal(output[0, alone:], own[0, alone:])


@torch.no_grad()
def test_keys_scattered_all_over_take_one_pass(
    request: pytest.FixtureRequest,
) -> None:
    subject = models.make("stories", request)
    with routes(True) as made, ab.steer(subject.model, Moved(layout="scattered", heads="all")):
        subject.model(input_ids=models.tokens(2, LENGTH))
    assert made
    assert all(one is None for one in made)


@torch.no_grad()
@pytest.mark.parametrize("name", ["stories", "gpt_oss", "mistral"])
@pytest.mark.parametrize("heads", ["all", (1, 2)])
def test_decoded_tokens_row_by_row(name: str, heads: Any, request: pytest.FixtureRequest) -> None:
    """Against one pass, with two reallocations and a bias, grouped heads, padding and a window."""
    subject = models.make(name, request)
    ids = models.tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    rules = (
        ab.rules.KeyShift(keys=(2,), amount=1.5, heads=heads),
        Moved(layout="first", heads=heads),
        Moved(layout="holes", heads=heads),
    )
    found = []
    for few in (0, 4):
        calls = []
        real = lines.Lines

        def watched(*given: Any, real: Any = real, calls: list[int] = calls) -> Any:
            calls.append(given[0].shape[2])
            return real(*given)

        with (
            mock.patch.object(lines, "FEW", few),
            mock.patch.object(edit, "Lines", watched),
            ab.steer(subject.model, *rules),
        ):
            out = subject.model(input_ids=ids[:, :8], attention_mask=mask[:, :8], use_cache=True)
            logits = []
            for step in range(8, 12):
                out = subject.model(
                    input_ids=ids[:, step : step + 1],
                    attention_mask=mask[:, : step + 1],
                    past_key_values=out.past_key_values,
                )
                logits.append(out.logits)
        assert bool(calls) == (few > 0)
        assert all(count == 1 for count in calls)
        found.append(torch.cat(logits, 1))
    assert (found[0] - found[1]).abs().max() < 2e-5 * found[0].abs().max()


@torch.no_grad()
def test_chunked_prefill_apart(request: pytest.FixtureRequest) -> None:
    """Queries after keys that are in the cache."""
    subject = models.make("stories", request)
    ids = models.tokens(2, LENGTH)
    rule = Moved(layout="stretch", heads="all")
    with ab.steer(subject.model, rule):
        whole = subject.model(input_ids=ids).logits
    for cut in (3, 10, 25):
        with routes(True) as made, ab.steer(subject.model, rule):
            first = subject.model(input_ids=ids[:, :cut], use_cache=True)
            rest = subject.model(input_ids=ids[:, cut:], past_key_values=first.past_key_values)
        assert all(one is not None for one in made)
        assert torch.allclose(rest.logits, whole[:, cut:], atol=2e-4), cut


def test_with_gradients_one_pass(request: pytest.FixtureRequest) -> None:
    subject = models.make("stories", request)
    with routes(True) as made, ab.steer(subject.model, Moved(heads="all")):
        subject.model(input_ids=models.tokens(2, LENGTH)).logits.sum().backward()
    assert made
    assert all(one is None for one in made)
