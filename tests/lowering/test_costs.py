"""The table of measured costs: counts of work, prices, the choice, the files it is read from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import attnbias as ab
from attnbias import native
from attnbias.attention import _problem
from attnbias.lowering import LOWERINGS, Problem, choose, costs, effort, offers, work

CPU = torch.device("cpu")
WAYS = [f"{way} {kind}" for way in effort.DIRECTIONS for kind in ("float32", "bfloat16")]


def problem(
    n: int = 300, m: int = 300, bias: ab.Bias | None = None, *, causal: bool = False, size: int = 16
) -> Problem:
    q, k, v = (torch.randn(2, 4, length, size) for length in (n, m, m))
    found = _problem(q, k, v, bias, causal, None, None, "softmax", 0.0, None)
    for lowering in LOWERINGS.values():
        lowering.answer(found)
    return found


def written(path: Path, seconds: dict[str, float], device: str | None = None) -> Path:
    """A table in which every lowering was measured."""
    table = {
        "device": device or costs.device_kind(CPU),
        "measured": "a made-up machine",
        "lowerings": dict.fromkeys(work.COUNTS, WAYS),
        "seconds": seconds,
    }
    path.write_text(json.dumps({"version": costs.VERSION, "tables": [table]}), encoding="utf-8")
    return path


@pytest.fixture
def loops() -> None:
    if not native.installed():
        pytest.skip("compiled loops: numba is not installed")


SECONDS = {"operator float32 products": 1e-11, "stream products": 2e-11, "own call": 1e-3}


# Counts ------------------------------------------------------------------------------------------


def test_products_are_features_times_scores() -> None:
    found = work.counts("sdpa", problem())
    assert found["operator float32 products"] == 8 * 300 * 300 * 32
    assert found["operator float32 masked"] == 0
    assert found["sdpa call"] == 1
    assert not any(name.startswith("tiles") for name in found)


def test_a_mask_counts_whole_tiles_on_its_edge() -> None:
    whole = work.counts("tiled", problem(1024, 1024, ab.forms.ALiBi(4)(1024)))
    half = work.counts("tiled", problem(1024, 1024, ab.forms.ALiBi(4)(1024), causal=True))
    share = half["operator float32 scores"] / whole["operator float32 scores"]
    assert share == pytest.approx((4 + 3 + 2 + 1) / 16, abs=2e-3)


@pytest.mark.parametrize("name", ["tiled", "stream", "own"])
def test_segments_and_neighbourhoods_skip_what_no_query_of_a_tile_sees(name: str) -> None:
    ids = torch.arange(2048) // 512
    seen = work.counts(name, problem(2048, 2048, ab.Segments(ids, ids)))
    every = work.counts(name, problem(2048, 2048, ab.forms.ALiBi(4)(2048)))
    what = "operator float32 scores" if name == "tiled" else f"{name} scores"
    assert 0.25 <= seen[what] / every[what] <= 0.4
    near = work.counts(name, problem(2048, 2048, ab.Neighborhood((32, 64), (5, 5))))
    assert 5 / 32 <= near[what] / every[what] <= 13 / 32


def test_entries_that_are_shared_are_counted_once() -> None:
    points = torch.rand(600, 2)
    one = ab.Distance(points, points, ab.radial.Scalar(-1.0))
    many = ab.Distance(points, points, ab.radial.Scalar(-torch.ones(4)))
    for name in ("tiled", "own"):
        few, all_ = (work.counts(name, problem(600, 600, b)) for b in (one, many))
        assert all_["entries Distance Scalar"] == 4 * few["entries Distance Scalar"]


def test_backward_passes_are_those_that_run() -> None:
    table = torch.randn(4, 599)
    fixed = problem(300, 300, ab.Relative(table, queries=300, keys=300))
    fixed.query.requires_grad_()
    assert "operator backward float32 products" in work.counts("strided", fixed)
    assert "tiles products" in work.counts("stream", fixed)
    assert "own backward products" in work.counts("own", fixed)
    assert not any("pull" in name for name in work.counts("stream", fixed))
    learned = problem(300, 300, ab.Relative(table.requires_grad_(), queries=300, keys=300))
    assert effort.direction(learned) == "learned"
    for name in ("strided", "stream", "tiled"):
        found = work.counts(name, learned)
        assert "tiles products" in found
        assert found["pull Relative"] > 0
        assert "operator backward float32 products" not in found
    assert work.counts("own", learned)["own sums Relative"] > 0


def test_every_lowering_that_offers_on_a_processor_is_counted() -> None:
    """One problem for each; a new lowering needs counts, or the table can never choose it."""
    grid = ab.GridRelative(torch.randn(4, 39, 29), (20, 15))
    ids = torch.arange(300) // 100
    biases = [
        None,
        ab.KeyBias(torch.randn(300)),
        ab.forms.ALiBi(4)(300),
        grid,
        ab.LowRank(torch.randn(300, 2), torch.randn(300, 2)),
        ab.Segments(ids, ids),
    ]
    offering = set()
    for bias in biases:
        given = problem(bias=bias)
        for offer in offers(given):
            if offer.refused or offer.lowering not in work.COUNTS:
                continue
            offering.add(offer.lowering)
            found = work.counts(offer.lowering, given)
            assert all(number >= 0 for number in found.values()), (offer.lowering, found)
    cards = {"triton", "flex"}
    wanted = set(LOWERINGS) - {"reference"} - (set() if native.available() else {"own"})
    assert wanted - cards <= offering <= wanted
    assert set(work.COUNTS) == set(LOWERINGS) - {"reference"}


def test_a_kernel_counts_what_it_makes_and_sums() -> None:
    table = torch.randn(4, 599, requires_grad=True)
    given = problem(300, 300, ab.Relative(table, queries=300, keys=300))
    found = work.counts("triton", given)
    assert found["triton float32 products"] == 8 * 300 * 300 * 32
    assert found["triton backward float32 products"] == found["triton float32 products"]
    assert found["triton sums Relative"] == found["triton reads Relative"] > 0
    assert not any(name.startswith("tiles") for name in found)


def test_what_learns_by_atomic_additions_is_not_chosen_by_its_time(tmp_path: Path) -> None:
    (table,) = costs.read(written(tmp_path / "costs.json", SECONDS))
    bias = ab.Relative(torch.randn(4, 599), queries=300, keys=300)
    fixed = problem(300, 300, bias)
    assert "flex" in table.measured_in(fixed)
    learned = problem(
        300, 300, ab.Relative(torch.randn(4, 599).requires_grad_(), queries=300, keys=300)
    )
    assert "flex" not in table.measured_in(learned)
    assert "triton" in table.measured_in(learned)


def test_a_graph_that_is_compiled_takes_the_own_prices(
    tmp_path: Path, loops: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with costs.using(written(tmp_path / "costs.json", SECONDS)):
        assert costs.table(CPU) is not None
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert costs.table(CPU) is None


# Prices ------------------------------------------------------------------------------------------


def test_a_price_is_the_sum_of_what_is_done(tmp_path: Path, loops: None) -> None:
    given = problem(bias=ab.forms.ALiBi(4)(300))
    with costs.using(written(tmp_path / "costs.json", SECONDS)):
        found = {offer.lowering: offer for offer in offers(given)}
        plan = ab.explain(given.query, given.key, given.value, bias=given.bias)
    floor = 1e-11 * 8 * 300 * 300 * 32
    assert found["strided"].seconds == pytest.approx(floor)
    assert found["strided"].time == pytest.approx(1.0)
    assert found["stream"].time == pytest.approx(2.0)
    assert found["own"].seconds == pytest.approx(1e-3)
    assert found["reference"].seconds == 0.0
    assert plan.source == "measured: a made-up machine"
    assert plan.shares == (("operator float32 products", pytest.approx(1.0)),)
    assert "a made-up machine" in str(plan)
    assert "operator float32 products 100%" in str(plan)


def test_the_cheapest_by_the_table_runs(tmp_path: Path, loops: None) -> None:
    bias = ab.forms.ALiBi(4)(300)
    table = written(tmp_path / "costs.json", SECONDS | {"strided call": 1.0, "tiled call": 1.0})
    with costs.using(table):
        assert choose(problem(bias=bias)).name == "stream"
        assert offers(problem(bias=bias))[0].lowering == "stream"
    with costs.using(written(table, SECONDS | {"stream call": 1.0, "own call": 1e-9})):
        assert choose(problem(bias=bias)).name == "own"
    with costs.unmeasured():
        assert all(offer.seconds == 0.0 for offer in offers(problem(bias=bias)))


def test_what_was_not_measured_comes_after_what_was(tmp_path: Path, loops: None) -> None:
    """The oracle has a price of 20; the measured lowerings of a tiny problem are dearer."""
    given = problem(4, 4, ab.forms.ALiBi(4)(4))
    with costs.using(
        written(
            tmp_path / "costs.json",
            SECONDS | {"strided call": 1.0, "stream call": 1.0, "tiled call": 1.0},
        )
    ):
        found = offers(given)
        assert found[0].time > 20
        assert found[0].lowering in ("strided", "stream", "tiled")
        assert choose(given).name == found[0].lowering
    rank = [offer.seconds > 0 for offer in found if not offer.refused]
    assert rank == sorted(rank, reverse=True)


def test_other_formats_devices_and_plain_loops_keep_their_prices(
    tmp_path: Path, loops: None
) -> None:
    path = written(tmp_path / "costs.json", SECONDS)
    bias = ab.forms.ALiBi(4)(300)
    with costs.using(path):
        q = torch.randn(1, 4, 300, 16)
        assert ab.explain(q, q, q, bias=bias).offers[0].seconds > 0
        double = q.double()
        assert ab.explain(double, double, double, bias=bias).offers[0].seconds == 0
        with native.disabled():
            assert ab.explain(q, q, q, bias=bias).offers[0].seconds == 0
        assert ab.explain(*(q[:, :, :0],) * 3).offers[0].seconds == 0
    with costs.using(written(path, SECONDS, "cpu of another kind")):
        table = costs.table(CPU)
        assert table is None or table.measured != "a made-up machine"


def test_an_unknown_structure_is_taken_as_the_middle_of_the_known(tmp_path: Path) -> None:
    path = written(tmp_path / "costs.json", {"entries A": 1.0, "entries B": 3.0, "entries C": 2.0})
    (table,) = costs.read(path)
    assert table.times({"entries Other": 2.0, "nobody's": 5.0, "entries B": 1.0}) == {
        "entries Other": 4.0,
        "nobody's": 0.0,
        "entries B": 3.0,
    }


def test_a_choice_is_remembered_and_another_problem_is_another(
    tmp_path: Path, loops: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fresh(**change: object) -> Problem:
        found: Problem = problem(**{"bias": ab.forms.ALiBi(4)(300)} | change)
        return found

    q = torch.randn(2, 4, 300, 16)
    ids = torch.arange(300) // 100
    others = [
        fresh(causal=True),
        fresh(size=24),
        fresh(bias=ab.forms.ALiBi(4, slopes=torch.rand(4, requires_grad=True))(300)),
        fresh(bias=ab.forms.ALiBi(4)(300) + ab.KeyBias(torch.randn(300))),
        fresh(bias=ab.forms.ALiBi(4)(300) + ab.Padding(torch.arange(300) < 200)),
        fresh(bias=ab.forms.ALiBi(4)(300) + ab.Segments(ids, ids)),
        fresh(n=30, bias=ab.forms.ALiBi(4)(30, 300)),
        dataclasses.replace(fresh(), query=q.requires_grad_()),
        dataclasses.replace(fresh(), dropout=0.1),
        dataclasses.replace(fresh(), key=torch.randn(2, 2, 300, 16)),
    ]
    keys = [effort.Effort.of(one).key() for one in [fresh(), *others]]
    assert effort.Effort.of(fresh()).key() == keys[0]
    assert len(set(keys)) == len(keys)
    with costs.using(written(tmp_path / "costs.json", SECONDS)):
        first = [choose(one).name for one in others]
        assert [offers(one)[0].lowering for one in others] == first
        monkeypatch.setattr(costs.Table, "total", lambda *_: pytest.fail("counted again"))
        assert [choose(one).name for one in others] == first


# Files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "no table of costs of version"),
        ('{"version": 0, "tables": []}', "no table of costs of version"),
        ('{"version": 1, "tables": [{"device": "cpu"}]}', "damaged"),
        (
            '{"version": 1, "tables": [{"device": "cpu", "measured": "", "lowerings": {}, '
            '"seconds": {"a": -1}}]}',
            "damaged",
        ),
    ],
)
def test_a_bad_file_is_complained_of(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ab.AttnbiasError, match=words):
        costs.read(path)
    with pytest.raises(ab.AttnbiasError, match="cannot be read"):
        costs.read(tmp_path / "missing.json")


def test_the_users_table_comes_before_the_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loops: None
) -> None:
    path = written(tmp_path / "costs.json", SECONDS)
    monkeypatch.setenv("ATTNBIAS_COSTS", str(path))
    costs._installed.cache_clear()
    try:
        table = costs.table(CPU)
        assert table is not None
        assert table.measured == "a made-up machine"
        monkeypatch.setenv("ATTNBIAS_COSTS", str(tmp_path / "none.json"))
        costs._installed.cache_clear()
        with pytest.raises(ab.AttnbiasError, match="does not exist"):
            costs.table(CPU)
        monkeypatch.delenv("ATTNBIAS_COSTS")
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
        assert costs.user_path() == tmp_path / "attnbias" / "costs.json"
    finally:
        costs._installed.cache_clear()
