"""A sample of the queries: who is drawn, what is shown, and whether the stated error is one."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.errors import AttnbiasError, Refused
from attnbias.observe import Row, Seen, Table
from attnbias.observe import tiles as tiling
from attnbias.observe.observer import Observer
from attnbias.observe.sampling import CLASSES, Sampler, hadamard
from tests.cases.statistic import CALLS, TARGETS, close, every, spans_for
from tests.observe import models
from tests.observe.calls import FakeCall, dense_of, random_call

s = ab.statistics
SAMPLED = [one for one in every() if one.sampled is not False]


def seen_of(
    call: FakeCall, statistics: Any, queries: int | None, seed: int = 0, extra: Any = None,
    fused: bool = True,
) -> Seen:  # fmt: skip
    sampler = None if queries is None else Sampler(queries, seed)
    observer = Observer(
        statistics, spans=spans_for(call), targets=TARGETS, sampler=sampler, fused=fused
    )
    observer.few = 0
    observer.see(call, extra, call.query, None)  # type: ignore[arg-type]
    return observer.seen


def drawn(call: FakeCall, queries: int, seed: int = 0) -> list[Tensor]:
    """The slots that an observer with that seed draws first, for each row."""
    real = (call.query_positions >= 0).expand(call.query.shape[0], -1)
    draw = Sampler(queries, seed).draw(real)
    assert draw is not None
    return [row[row >= 0] for row in draw.slots]


# Who is drawn ---------------------------------------------------------------------------------


def test_every_query_is_drawn_equally_often() -> None:
    """Also the first and the last, also where the strata cannot be equal."""
    rounds, size, queries = 3000, 23, 8
    counts = torch.zeros(size)
    sampler = Sampler(queries, 1)
    for _ in range(rounds):
        draw = sampler.draw(torch.ones(1, size, dtype=torch.bool))
        assert draw is not None
        slots = draw.slots[0]
        assert len(slots) == queries
        assert bool((slots.diff() > 0).all())
        counts[slots] += 1
    share = queries / size
    sd = (share * (1 - share) / rounds) ** 0.5
    assert float((counts / rounds - share).abs().max()) < 4 * sd


def test_the_sample_is_spread_over_the_row() -> None:
    draw = Sampler(20, 0).draw(torch.ones(1, 1000, dtype=torch.bool))
    assert draw is not None
    gaps = torch.cat([draw.slots[0].diff(), draw.slots[0][:1] + 1000 - draw.slots[0][-1:]])
    assert int(gaps.max()) < 100  # strata are 50 queries long
    assert float(draw.weights) == 50
    assert int(draw.signs.sum()) == 0


def test_padding_is_never_drawn_and_short_rows_are_taken_whole() -> None:
    real = torch.ones(3, 50, dtype=torch.bool)
    real[0, :20] = False
    real[1, 10:] = False
    real[2] = False
    draw = Sampler(12, 0).draw(real)
    assert draw is not None
    assert [int((row >= 0).sum()) for row in draw.slots] == [12, 10, 0]
    assert int(draw.slots[0].min()) >= 20
    assert draw.slots[1][:10].tolist() == list(range(10))
    assert draw.weights.tolist() == [2.5, 1, 1]
    assert draw.shrink[1] == draw.shrink[2] == 0
    assert Sampler(30, 0).draw(real) is None


def test_signs_are_balanced() -> None:
    for classes in CLASSES:
        signs = hadamard(classes + 1)[:, 1:]
        assert torch.equal(signs.T @ signs, (classes + 1) * torch.eye(classes).double())
        assert float(signs.sum(0).abs().max()) == 0


def test_an_odd_number_is_the_next_even_one() -> None:
    assert Sampler(7).queries == 8


# What is shown --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_what_is_drawn_is_exact_and_the_rest_is_not_there(name: str) -> None:
    call = random_call(**CALLS[name])
    if call.query.shape[2] <= 10:
        return
    slots = drawn(call, 10)
    rows = [q for q in SAMPLED if q.over == "query" and q.axes()[:1] == ("query",)]
    assert len(rows) >= 6
    part, whole = seen_of(call, rows, 10), seen_of(call, rows, None)
    for one in rows:
        got, want = (x.tensor(one.label).values[0, 0] for x in (part, whole))
        for row, at in enumerate(slots):
            places = call.query_positions.expand(len(got), -1)[row, at]
            close(got[row, :, places], want[row, :, places])
            others = torch.ones(got.shape[2], dtype=torch.bool)
            others[places] = False
            assert bool(got[row][:, others].isnan().all())


@pytest.mark.parametrize(
    "name", ["causal", "left padding", "right padding", "packed and padded", "sinks",
             "mask function", "position bias", "fewer queries, window, padding", "bfloat16"],
)  # fmt: skip
def test_sums_over_queries_are_those_drawn_scaled_up(name: str) -> None:
    call = random_call(**CALLS[name])
    whole = dense_of(call)
    got = seen_of(call, [s.Received(), s.Received("visible")], 10)
    want, counts = torch.zeros_like(whole.p[:, :, 0]), torch.zeros_like(whole.p[:, :, 0])
    for row, at in enumerate(drawn(call, 10)):
        places = call.query_positions[row, at]
        weight = int((call.query_positions[row] >= 0).sum()) / len(at)
        want[row] = weight * whole.p[row][:, places].nan_to_num(0.0).sum(1)
        counts[row] = weight * whole.visible[row][:, places].sum(1)
    there = whole.has_key.expand_as(want)
    close(got.tensor("received").values[0, 0], want.masked_fill(~there, torch.nan))
    share = torch.where(there & (counts > 0), want / counts, torch.nan)
    close(got.tensor("received[visible]").values[0, 0], share)


def test_sees_the_edit() -> None:
    call = random_call(padding="left")
    extra = ab.KeyBias(torch.randn(2, 4, 40)) + ab.Dense(torch.randn(2, 4, 40, 40))
    statistics = [s.Entropy(), s.Received()]
    part = seen_of(call, statistics, 10, extra=extra).tensor("entropy").values[0, 0]
    whole = seen_of(call, statistics, None, extra=extra).tensor("entropy").values[0, 0]
    there = ~part.isnan()
    assert int(there.sum()) == 2 * 4 * 10
    close(part[there], whole[there])


def test_rows_of_a_batch_do_not_touch_each_other() -> None:
    call = random_call(padding="left")
    labels = ["entropy", "received", "received[visible]"]
    before = seen_of(call, labels_of(labels), 10)
    call.query[1] += 1
    call.key[1] *= 2
    after = seen_of(call, labels_of(labels), 10)
    for label in labels:
        a, b = (x.tensor(label).values[0, 0, 0].nan_to_num(0.0) for x in (before, after))
        assert torch.equal(a, b)


def labels_of(names: list[str]) -> list[s.Statistic]:
    return [next(one for one in SAMPLED if one.label == name) for name in names]


@pytest.mark.parametrize("name", ["causal", "left padding", "position bias", "long"])
def test_few_rows_are_simply_exact(name: str) -> None:
    call = random_call(**CALLS[name])
    exact, all_of_them = seen_of(call, SAMPLED, None), seen_of(call, SAMPLED, 300)
    for want, got in zip(exact.table(), all_of_them.table(), strict=True):
        assert got[:4] == want[:4]
        assert got.value == want.value or (math.isnan(got.value) and math.isnan(want.value))
        assert got.error == 0 or math.isnan(want.value)


# The stated error -----------------------------------------------------------------------------


def test_means_are_unbiased_and_the_error_covers() -> None:
    """Over seeds: the mean of the estimates is the exact value, about 95% lie within 2 errors."""
    call = random_call(queries=300, size=16, heads=4, groups=2, padding="left", sharp=0.5)
    names = ["entropy", "distance", "share", "received[queries]", "peak"]
    chosen = labels_of(names)
    exact = seen_of(call, chosen, None).table()
    rounds = 60
    found = [seen_of(call, chosen, 60, seed).table() for seed in range(rounds)]
    values = torch.tensor([[row.value for row in table] for table in found]).double()
    errors = torch.tensor([[row.error for row in table] for table in found]).double()
    truth = torch.tensor([row.value for row in exact]).double()
    labels = [row.statistic for row in exact]
    spread = values.std(0)
    assert float(spread.min()) > 0
    off = (values.mean(0) - truth) / (spread / rounds**0.5)
    assert float(off.abs().max()) < 4.5
    inside = ((values - truth).abs() <= 2 * errors).double()
    for label in set(labels):
        here = [n for n, one in enumerate(labels) if one == label]
        assert float(inside[:, here].mean()) > 0.88, label
    assert 0.92 < float(inside.mean()) < 0.995
    # Neither blown up: the root mean square error is near the true spread.
    size = errors.square().mean(0).sqrt() / spread
    assert 0.8 < float(size.median()) < 1.6
    assert float(size.max()) < 2.2


@pytest.mark.slow
def test_the_coverage_that_the_page_states(root: Path) -> None:
    """docs/observe_corpus.md: shares of exact values within two standard errors."""
    lines = (root / "docs" / "observe_corpus.md").read_text("utf-8").splitlines()
    stated = {
        cells[0].strip(): [float(cell) for cell in cells[1:4]]
        for cells in (line.strip("|").split("|") for line in lines)
        if len(cells) == 4 and cells[1].strip().startswith("0.")
    }
    names = {
        "entropy": "entropy", "mean distance": "distance", "largest weight": "peak[weight]",
        "first token": "first_token", "previous token": "offset",
    }  # fmt: skip
    assert set(stated) == set(names)
    call = random_call(queries=300, size=16, heads=4, groups=2, sharp=0.5)
    kinds = [s.Entropy(), s.Distance(), s.Peak(), s.FirstToken(), s.Offset()]
    exact = seen_of(call, kinds, None).table()
    for column, queries in enumerate((16, 40, 120)):
        inside: dict[str, list[bool]] = {}
        for seed in range(120):
            found = seen_of(call, kinds, queries, seed, fused=False).table()
            for want, got in zip(exact, found, strict=True):
                near = abs(got.value - want.value) <= 2 * (got.error or 0.0)
                inside.setdefault(got.statistic, []).append(near)
        for name, label in names.items():
            share = sum(inside[label]) / len(inside[label])
            assert share == pytest.approx(stated[name][column], abs=0.02), (name, queries)


def test_the_error_shrinks_with_the_sample_and_ends_at_zero() -> None:
    call = random_call(queries=256, batch=1, size=16, sharp=0.5)
    sizes = []
    for queries in (32, 128, 250, 256):
        tables = [seen_of(call, [s.Entropy()], queries, seed).table() for seed in range(8)]
        sizes.append(sum(row.error or 0.0 for table in tables for row in table))
    # Four times the sample: half the error, and less by sqrt((1 - 1/2) / (1 - 1/8)).
    assert 0.2 < sizes[1] / sizes[0] < 0.55
    assert sizes[2] < 0.35 * sizes[1]
    assert sizes[3] == 0


def test_the_largest_sum_loses_its_bias() -> None:
    """The largest of noisy sums is too large; the replicates say by how much."""
    call = random_call(queries=300, batch=1, size=16, sharp=0.5)
    truth = torch.tensor([row.value for row in seen_of(call, [s.Received()], None).table()])
    plain, mended = [], []
    for seed in range(40):
        seen = seen_of(call, [s.Received()], 40, seed)
        plain.append(seen.tensor("received").values[0, 0, 0].amax(-1))
        mended.append(torch.tensor([row.value for row in seen.table()]))
    before, after = (float((torch.stack(x).mean(0) - truth).mean()) for x in (plain, mended))
    assert before > 0.02 * float(truth.mean())
    assert abs(after) < 0.35 * before


def test_runs_and_rows_of_other_lengths_weigh_as_they_should(stories: Path) -> None:
    """A prefill that is sampled, steps that are not, a ragged batch and a short second run: the
    mean is that over all queries."""
    model = models.stories_model(stories)
    ids = models.tokens(2, 200, 500)
    real = torch.ones(2, 200, dtype=torch.bool)
    real[1, :130] = False

    def table(queries: int | None, seed: int = 0) -> Table:
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
        given = {"queries": queries, "seed": seed} if queries else {}
        kinds = [s.Entropy(), s.SinkRate(0.02), s.Received("queries")]
        with torch.no_grad(), ab.observe(model, kinds, **given) as seen:
            for start, stop in ((0, 180), (180, 196), *((n, n + 1) for n in range(196, 200))):
                model(
                    input_ids=ids[:, start:stop], attention_mask=real[:, :stop].long(),
                    position_ids=models.positions(real)[:, start:stop], past_key_values=cache,
                )  # fmt: skip
            model(input_ids=ids[:1, :40], use_cache=False)
        assert seen.runs == 2
        return seen.table()

    exact = table(None)
    found = [table(30, seed) for seed in range(24)]
    at = [n for n, row in enumerate(exact) if row.statistic == "entropy"]
    values = torch.tensor([[t[n].value for n in at] for t in found]).double()
    errors = torch.tensor([[t[n].error for n in at] for t in found]).double()
    truth = torch.tensor([exact[n].value for n in at]).double()
    off = (values.mean(0) - truth) / (values.std(0) / len(found) ** 0.5)
    assert float(off.square().mean().sqrt()) < 1.5  # 40 heads: about 1 where there is no bias
    assert float(((values - truth).abs() <= 2 * errors).double().mean()) > 0.88
    # Received adds up to the number of queries: its sum over keys is not noisy at all.
    sink = [n for n, row in enumerate(exact) if row.statistic.startswith("sink_rate")]
    assert any(exact[n].value != exact[sink[0]].value for n in sink)


@pytest.mark.parametrize(
    "name", ["minilm, padded", "stories, left padding", "mistral, window", "gpt-oss, sinks", "bart",
             "t5, position bias", "vit", "stories, packed"],
)  # fmt: skip
def test_real_models_within_the_error(name: str, request: pytest.FixtureRequest) -> None:
    scenario = models.scenario(name, request)
    statistics = [s.Entropy(), s.Peak()]
    exact = scenario.observe(statistics).table()
    want = torch.tensor([row.value for row in exact]).double()
    off, bound = [], []
    for seed in range(6):
        table = scenario.observe(statistics, queries=12, seed=seed).table()
        off.append(torch.tensor([row.value for row in table]).double() - want)
        bound.append(torch.tensor([row.error for row in table]).double())
    inside = torch.stack(off).abs() <= 2.5 * torch.stack(bound)  # few degrees of freedom
    assert float(inside.double().mean()) > 0.85
    assert float(torch.stack(off).abs().max()) > 0


def test_the_model_is_left_alone(stories: Path) -> None:
    model = models.stories_model(stories)
    ids = models.tokens(1, 60, 500)
    with torch.no_grad():
        want = model(input_ids=ids).logits
        with ab.observe(model, [s.Received(), s.Entropy()], queries=8):
            got = model(input_ids=ids).logits
    assert torch.equal(want, got)


def test_cost_grows_with_the_sample_and_not_with_its_square(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built = []
    plain = tiling._tile

    def counting(*given: Any) -> Any:
        built.append(given[5].numel())
        return plain(*given)

    monkeypatch.setattr(tiling, "_tile", counting)
    call = random_call(queries=600, batch=1, masks="")
    seen_of(call, [s.Peak(), s.Received()], 60)
    assert sum(built) <= 4 * 90 * 600  # heads x queries drawn (groups padded) x keys


# Arguments and files --------------------------------------------------------------------------


def test_the_same_seed_draws_the_same() -> None:
    call = random_call(queries=100)
    one, two, other = (str(seen_of(call, SAMPLED, 20, seed)) for seed in (3, 3, 4))
    assert one == two
    assert one != other


@pytest.mark.parametrize("queries", [1, 0, -4, 2.5, True, "8"])
def test_bad_numbers_are_one_sentence(queries: Any, stories: Path) -> None:
    model = models.stories_model(stories)
    with (
        pytest.raises(AttnbiasError, match=r"queries must be a whole number of 2 or more, got"),
        ab.observe(model, ["entropy"], queries=queries),
    ):
        pass


def test_what_cannot_be_sampled_is_refused(stories: Path) -> None:
    model = models.stories_model(stories)
    spans = {"span": (0, 3)}
    with (
        pytest.raises(Refused, match=r"given.* needs all queries .* without queries="),
        ab.observe(model, [s.Given()], spans=spans, queries=8),
    ):
        pass


def test_files_gain_a_column_and_stay_readable(tmp_path: Path) -> None:
    seen = seen_of(random_call(queries=100), [s.Entropy(), s.Received()], 20)
    plain = seen_of(random_call(queries=100), [s.Entropy(), s.Received()], None)
    for one, more in ((plain, []), (seen, ["error"])):
        one.save(tmp_path / "t.csv")
        one.save(tmp_path / "t.json")
        rows = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
        columns = ["tower", "layer", "head", "statistic", "value", *more]
        assert list(rows[0]) == columns
        payload = json.loads((tmp_path / "t.json").read_text())
        assert payload["columns"] == columns
        assert [Row(*row) for row in payload["rows"]] == list(one.table())
        assert [float(row["value"]) for row in rows] == [row.value for row in one.table()]
        assert list(one.table().to_pandas().columns) == columns
        assert payload.get("queries") == (20 if more else None)
    assert all(row.error is None for row in plain.table())
    assert " ± " in str(seen)
    assert " ± " not in str(plain)


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="parquet: pyarrow is not there")
    seen = seen_of(random_call(queries=100), [s.Entropy(), s.Received()], 20)
    seen.save(tmp_path / "t.parquet")
    read = parquet.read_table(tmp_path / "t.parquet")
    assert [str(kind) for kind in read.schema.types] == [
        "string", "int64", "int64", "string", "double", "double",
    ]  # fmt: skip
    assert [Row(**row) for row in read.to_pylist()] == list(seen.table())
    assert json.loads(read.schema.metadata[b"attnbias"])["schema"] == "attnbias.observe/1"
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(AttnbiasError, match=r"pyarrow: write pip install 'attnbias\[parquet\]'"):
        seen.save(tmp_path / "u.parquet")
    assert not (tmp_path / "u.parquet").exists()
