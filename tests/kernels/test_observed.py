"""`observe` by the statistics kernel: every statistic against whole maps, and real models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.bias import Bias
from attnbias.observe import on_chip
from attnbias.observe.observer import Observer
from attnbias.observe.scene import Scene
from attnbias.observe.statistic import Statistic
from tests.cases.statistic import CALLS, TARGETS, StatisticCase, close, spans_for
from tests.observe import models
from tests.observe import test_statistics as cases
from tests.observe.calls import FakeCall, dense_of, random_call

pytest.importorskip("triton", reason="Triton: an extra where there is no GPU")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES: list[StatisticCase] = [
    case() for case in vars(cases).values()
    if isinstance(case, type) and issubclass(case, StatisticCase) and case is not StatisticCase
]  # fmt: skip
# Of the same calls, smaller: an interpreted tile of two heads is as slow as one of twenty.
SMALL: dict[str, dict[str, Any]] = {"long": {"queries": 70, "heads": 1, "groups": 1}}


def moved(bias: Bias) -> Bias:
    """A bias of `random_call` on the device of the test."""
    terms: list[Bias] = []
    for term in bias.terms():
        if isinstance(term, ab.Padding):
            terms.append(ab.Padding(term.keep.to(DEVICE)))
        elif isinstance(term, ab.Segments):
            terms.append(ab.Segments(term.query_ids.to(DEVICE), term.key_ids.to(DEVICE)))
        else:
            terms.append(term.with_parameters([p.to(DEVICE) for p in term.parameters()]))
    return sum(terms[1:], terms[0])


def observed(
    call: FakeCall, statistics: list[Statistic], extra: Bias | None = None
) -> dict[str, Tensor]:
    """The values of one call through the kernel, on the CPU."""
    names = ("query", "key", "query_positions", "key_positions", "sink")
    there = {n: getattr(call, n) for n in names}
    there = {n: None if t is None else t.to(DEVICE) for n, t in there.items()}
    bias = None if call.bias is None else moved(call.bias)
    one: Any = FakeCall(bias=bias, scale=call.scale, **there)
    observer = Observer(statistics, spans=spans_for(call), targets=TARGETS)
    observer.few = 0
    edit = None if extra is None else moved(extra)
    with on_chip.interpreted():
        assert on_chip.fits(Scene(one, edit))
        observer.see(one, edit, one.query, None)
    return {s.label: observer.seen.tensor(s.label).values[0, 0].cpu() for s in statistics}


def agree(call: FakeCall, extra: Bias | None = None) -> None:
    statistics = [case.build() for case in CASES]
    unique = list({s.label: s for s in statistics}.values())
    got = observed(call, unique, extra)
    whole = dense_of(call, extra, spans=spans_for(call))
    for case in CASES:
        label = case.build().label
        try:
            close(got[label], case.dense(whole))
        except AssertionError as error:
            raise AssertionError(f"{label}: {error}") from None


@pytest.mark.parametrize("name", [n for n in CALLS if n != "mask function"])
def test_every_statistic_equals_the_whole_map(name: str) -> None:
    agree(random_call(**{"size": 8, **CALLS[name], **SMALL.get(name, {})}))


@pytest.mark.parametrize("kind", ["key", "hide", "dense", "rank"])
def test_sees_the_edit(kind: str) -> None:
    call = random_call(padding="left", heads=2, groups=1, queries=20)
    weight = torch.randn(2, 2, 20)
    weight[:, :, 3:9] += 4
    if kind == "hide":
        weight[:, :, 7] = -torch.inf
    extra: Bias = ab.KeyBias(weight)
    if kind == "dense":
        extra = ab.Dense(torch.randn(2, 2, 20, 20) + weight[:, :, None])
    if kind == "rank":
        extra = ab.LowRank(torch.randn(2, 20, 2), torch.randn(1, 20, 2)) + extra
    agree(call, extra)
    entropy: list[Statistic] = [ab.statistics.Entropy()]
    plain = observed(call, entropy)["entropy"]
    assert (plain - observed(call, entropy, extra)["entropy"]).abs().nan_to_num(0).max() > 1e-2


def test_what_the_kernel_does_not_make_goes_by_tiles() -> None:
    call: Any = random_call(masks="function")
    with on_chip.interpreted():
        assert not on_chip.fits(Scene(call))
    call = random_call()
    assert DEVICE.type == "cuda" or not on_chip.fits(Scene(call))  # not unless it is asked for
    call.query, call.key = call.query.double(), call.key.double()
    with on_chip.interpreted():
        assert not on_chip.fits(Scene(call))


def test_a_log_sum_exp_that_is_known_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnbias.kernels import statistics_pass

    call: Any = random_call(queries=20, heads=2, groups=1)
    scene = Scene(call)
    lse = scene.lse
    known = Scene(call, lse=lse)

    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(statistics_pass, "log_sum_exp", never)
    with on_chip.interpreted():
        assert known.sweep({"columns"})
        close(known.columns, scene.columns)
        with pytest.raises(AssertionError):
            Scene(call).sweep({"columns"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_model(stories: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of a trained decoder with grouped heads, as on the other routes."""
    model = models.stories_model(stories)
    ids = torch.randint(3, 500, (1, 24), device=DEVICE)
    s = ab.statistics
    kinds = [s.Received(), s.Entropy(), s.Distance(), s.Share(), s.Peak(count=2)]
    tables, formats = [], []
    tensors = on_chip.tensors

    def spied(scene: Scene) -> tuple[Tensor, Tensor]:
        formats.append(tensors(scene)[0].dtype)
        return tensors(scene)

    monkeypatch.setattr(on_chip, "tensors", spied)
    before = next(model.parameters())
    try:
        model.to(DEVICE, dtype)
        for fused in (True, False):
            seen = ab.observe(model, kinds, spans={"a": (0, 5)}, layers=[0, 3], fused=fused)
            with on_chip.interpreted(), torch.no_grad(), seen as t:
                model(ids)
            tables.append({(r.layer, r.head, r.statistic): r.value for r in t.table()})
    finally:
        model.to(before.device, before.dtype)
    assert formats == [dtype] * 2  # once for each layer, in the model's own format
    assert tables[0].keys() == tables[1].keys()
    for place, value in tables[0].items():
        assert value == pytest.approx(tables[1][place], rel=2e-5, abs=2e-5), place
