"""Corpus runs in one process: the numbers, stopping and going on, the settings, the estimate."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import attnbias as ab
from attnbias.errors import AttnbiasError, Refused
from attnbias.observe import corpus
from attnbias.observe.corpus.estimate import Estimate, estimate, spoken
from attnbias.observe.corpus.table import COLUMNS, CorpusTable
from tests.observe import models

s = ab.statistics
KINDS = (s.Entropy(), s.Received("queries"), s.SinkRate(0.02))


@pytest.fixture
def model(stories: Path) -> nn.Module:
    return models.stories_model(stories)


@pytest.fixture
def tokenizer(stories: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(stories)


@pytest.fixture
def texts(shared: Path) -> list[str]:
    text = (shared / "data" / "tinyshakespeare.txt").read_text()
    return [text[900 * n : 900 * n + 90 + 37 * n] for n in range(9)]


def table_of(found: CorpusTable | None) -> CorpusTable:
    assert found is not None
    return found


class Killed(Exception):
    pass


def test_means_are_those_of_the_documents_one_by_one(
    model: nn.Module, tokenizer: Any, texts: list[str], tmp_path: Path
) -> None:
    found = table_of(corpus.run(model, tokenizer, corpus.of(texts), KINDS, out=tmp_path / "run"))
    columns = []
    for text in texts:
        with torch.no_grad(), ab.observe(model, KINDS) as seen:
            model(**tokenizer(text, return_tensors="pt"))
        columns.append([row.value for row in seen.table()])
    values = torch.tensor(columns).double()
    assert [row[:4] for row in found] == [row[:4] for row in seen.table()]
    assert torch.allclose(torch.tensor([r.mean for r in found]).double(), values.mean(0))
    error = values.std(0) / len(texts) ** 0.5
    assert torch.allclose(torch.tensor([r.error for r in found]).double(), error, atol=1e-12)
    assert all(row.documents == len(texts) for row in found)
    reach = torch.tensor([r.high - r.mean for r in found]).double()
    assert torch.allclose(reach, 2.306004135 * error, atol=1e-9)  # t, 8 degrees of freedom
    assert found.complete
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    assert found.meta["tokens"] == sum(lengths)
    assert [r.tokens for r in corpus.each(tmp_path / "run")] == lengths
    assert str(found).startswith("mean over 9 documents ± half of its 95% interval\n")


@pytest.mark.parametrize("stop", [0, 1, 4, 8])
def test_a_stopped_run_goes_on_to_the_same_numbers(
    model: nn.Module, tokenizer: Any, texts: list[str], tmp_path: Path, stop: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from attnbias.observe.corpus.work import Work

    given: Any = (model, tokenizer, corpus.of(texts), KINDS)
    want = table_of(corpus.run(*given, out=tmp_path / "whole"))
    plain, measured = Work.record, []

    def counting(work: Any, index: int) -> Any:
        if len(measured) == stop:
            raise KeyboardInterrupt
        measured.append(index)
        return plain(work, index)

    monkeypatch.setattr(Work, "record", counting)
    with pytest.raises(KeyboardInterrupt):
        corpus.run(*given, out=tmp_path / "stopped")
    part = corpus.load(tmp_path / "stopped")
    assert part.meta["documents"] == stop
    assert not part.complete
    again: list[int] = []
    monkeypatch.setattr(Work, "record", lambda w, n: (again.append(n), plain(w, n))[1])
    got = table_of(corpus.run(*given, out=tmp_path / "stopped"))
    assert sorted(measured + again) == list(range(9))  # nothing lost, nothing twice
    assert got == want
    assert got.to_csv() == want.to_csv()
    assert (tmp_path / "stopped" / "part-0.jsonl").read_bytes().count(b'{"document"') == 9
    third = table_of(corpus.run(*given, out=tmp_path / "stopped"))
    assert third == want
    assert len(again) == 9 - stop


def test_the_model_is_left_as_it_was(
    model: nn.Module, tokenizer: Any, texts: list[str], tmp_path: Path
) -> None:
    before = {name: one.clone() for name, one in model.state_dict().items()}
    model.train()
    try:
        state = torch.random.get_rng_state()
        corpus.run(model, tokenizer, corpus.of(texts[:2]), ["entropy"], out=tmp_path / "run",
                   say=lambda _: None)  # fmt: skip
        assert all(module.training for module in model.modules())
        assert torch.equal(torch.random.get_rng_state(), state)
    finally:
        model.eval()
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_other_settings_are_refused(
    model: nn.Module, tokenizer: Any, texts: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    corpus.run(model, tokenizer, corpus.of(texts[:2]), ["entropy"], out=out, name="a")
    other: list[tuple[dict[str, Any], str]] = [
        ({"name": "b"}, "model"), ({"max_tokens": 20}, "max_tokens"), ({"queries": 8}, "queries"),
        ({"layers": [0, 2]}, "layers"), ({"identity": "x"}, "weights"), ({"seed": 1}, "seed"),
        ({"spans": {"a": (0, 2)}}, "spans"),
    ]  # fmt: skip
    for change, named in other:
        with pytest.raises(AttnbiasError, match=f"holds a run with {named} .*, and now {named} is"):
            corpus.run(model, tokenizer, corpus.of(texts[:2]), ["entropy"], out=out,
                       **{"name": "a", **change})  # fmt: skip
    with pytest.raises(AttnbiasError, match="a run with corpus"):
        corpus.run(model, tokenizer, corpus.of(texts[:3]), ["entropy"], out=out, name="a")
    with pytest.raises(AttnbiasError, match="a run with statistics"):
        corpus.run(model, tokenizer, corpus.of(texts[:2]), ["distance"], out=out, name="a")
    # What does not touch a number may change.
    table = corpus.run(model, tokenizer, corpus.of(texts[:2]), ["entropy"], out=out, name="a",
                       confidence=0.5, interval="bootstrap")  # fmt: skip
    assert table_of(table).meta["interval"] == "bootstrap"


def test_a_document_too_long_is_named_before_anything_runs(
    model: nn.Module, tokenizer: Any, texts: list[str], tmp_path: Path
) -> None:
    long = " ".join(texts) * 3
    given = corpus.of([texts[0], long])
    with pytest.raises(
        AttnbiasError, match=r"line 2: the document has \d+ tokens, .* accepts 512; .*--max-tokens"
    ):
        corpus.run(model, tokenizer, given, ["entropy"], out=tmp_path / "run")
    assert b'"document"' not in b"".join(
        part.read_bytes() for part in (tmp_path / "run").glob("part*")
    )
    table = corpus.run(model, tokenizer, given, ["entropy"], out=tmp_path / "cut", max_tokens=30)
    assert table_of(table).meta["tokens"] == 60
    for wrong in (0, 513):
        with pytest.raises(AttnbiasError, match=r"max_tokens: .* from 1 to 512"):
            corpus.run(model, tokenizer, given, out=tmp_path / "x", max_tokens=wrong)


def test_bad_arguments_leave_no_folder(
    model: nn.Module, tokenizer: Any, texts: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    bad: list[tuple[dict[str, Any], str]] = [
        ({"confidence": 1.0}, "confidence must lie between 0 and 1"),
        ({"interval": "z"}, "interval is one of t, bootstrap"),
        ({"queries": 1}, "queries must be a whole number of 2"),
        ({"layers": [77]}, "there is no layer 77"),
        ({"statistics": [s.At("x")]}, "needs targets, which differ from document to document"),
        ({"statistics": ["nothing"]}, "no statistic is called 'nothing'"),
    ]
    for change, words in bad:
        with pytest.raises(AttnbiasError, match=words):
            corpus.run(model, tokenizer, corpus.of(texts), out=out, **change)
    with pytest.raises(Refused, match="cannot be sampled"):
        corpus.run(model, tokenizer, corpus.of(texts), [s.Given("a")], spans={"a": (0, 2)},
                   queries=8, out=out)  # fmt: skip
    assert not out.exists()


def test_sampled_documents_keep_their_errors_and_their_seeds(
    model: nn.Module, tokenizer: Any, texts: list[str], tmp_path: Path
) -> None:
    kinds = [s.Entropy(), s.Distance()]
    given: Any = (model, tokenizer, corpus.of(texts), kinds)
    exact = table_of(corpus.run(*given, out=tmp_path / "exact"))
    one = table_of(corpus.run(*given, out=tmp_path / "one", queries=16, seed=5))
    two = table_of(corpus.run(*given, out=tmp_path / "two", queries=16, seed=5))
    other = table_of(corpus.run(*given, out=tmp_path / "other", queries=16, seed=6))
    assert one == two
    assert one != other
    records = list(corpus.each(tmp_path / "one"))
    assert all(r.errors is not None and min(r.errors) >= 0 for r in records)
    # The noise of sampling is part of the spread of documents: the intervals hold the exact mean.
    near = [abs(a.mean - b.mean) <= b.high - b.mean for a, b in zip(exact, one, strict=True)]
    assert sum(near) / len(near) > 0.95
    reach = [sum(r.high - r.low for r in t.where(statistic="entropy")) for t in (exact, one)]
    assert reach[1] > reach[0]


def test_files(model: nn.Module, tokenizer: Any, texts: list[str], tmp_path: Path) -> None:
    found = table_of(corpus.run(model, tokenizer, corpus.of(texts[:4]), KINDS, out=tmp_path / "r"))
    found.save(tmp_path / "t.csv")
    rows = list(csv.reader((tmp_path / "t.csv").read_text().splitlines()))
    assert tuple(rows[0]) == COLUMNS
    kinds = (str, int, int, str, float, float, float, float, int)
    assert [tuple(k(x) for k, x in zip(kinds, r, strict=True)) for r in rows[1:]] == list(found)
    found.save(tmp_path / "t.json")
    payload = json.loads((tmp_path / "t.json").read_text())
    assert payload["schema"] == "attnbias.corpus/1"
    assert payload["settings"]["corpus"]["documents"] == payload["of"] == 4
    assert [tuple(row) for row in payload["rows"]] == list(found)
    frame = found.to_pandas()
    assert list(frame.columns) == list(COLUMNS)
    assert frame["mean"].tolist() == [row.mean for row in found]
    parquet = pytest.importorskip("pyarrow.parquet", reason="parquet: pyarrow is not there")
    found.save(tmp_path / "t.parquet")
    read = parquet.read_table(tmp_path / "t.parquet")
    assert [tuple(row.values()) for row in read.to_pylist()] == list(found)
    assert json.loads(read.schema.metadata[b"attnbias"])["documents"] == 4
    with pytest.raises(AttnbiasError, match=r"\.csv, \.json or \.parquet, got 't\.txt'"):
        found.save(tmp_path / "t.txt")
    with pytest.raises(AttnbiasError, match="columns tower, layer, head, statistic, mean"):
        found.where(value=1)
    assert len(found.where(statistic="entropy", layer=1)) == 8
    one = table_of(corpus.run(model, tokenizer, corpus.of(texts[:1]), KINDS, out=tmp_path / "one"))
    assert ",,," in one.to_csv()  # one document has no interval
    assert " ± " not in str(one).partition("\n")[2]


# The estimate -------------------------------------------------------------------------------------


def test_the_fit_finds_the_parts() -> None:
    found = Estimate([(n, 0.01 + 2e-5 * n + 3e-8 * n * n) for n in (32, 64, 128, 256, 512)])
    assert found.coefficients == pytest.approx((0.01, 2e-5, 3e-8), rel=1e-6)
    assert found.total([1000, 4000]) == pytest.approx(0.02 + 0.1 + 3e-8 * 17e6)
    flat = Estimate([(32, 0.1), (64, 0.09), (128, 0.1)])
    assert min(flat.coefficients) == 0
    assert flat.seconds(128) == pytest.approx(0.1, rel=0.1)
    assert Estimate([(5, 0.2)]).seconds(5) == pytest.approx(0.2)


def test_the_pieces_grow_until_one_takes_long() -> None:
    sizes: list[int] = []

    def work(ids: torch.Tensor) -> None:
        sizes.append(ids.shape[1])
        time.sleep(0.002 * ids.shape[1])

    found = estimate(work, torch.zeros(1, 5000, dtype=torch.long))
    assert max(sizes) < 600
    assert found.seconds(5000) == pytest.approx(10, rel=0.25)
    assert [n for n, _ in estimate(lambda ids: None, torch.zeros(1, 20)).pieces] == [20]


def test_the_estimate_is_within_a_factor_of_two(
    model: nn.Module, tokenizer: Any, shared: Path, tmp_path: Path
) -> None:
    """On a tiny model, with documents of very different lengths, on a machine that is shared."""
    from attnbias.observe.corpus.work import Work

    text = (shared / "data" / "tinyshakespeare.txt").read_text()
    sizes = [40, 80, 150, 300, 500, 60, 250, 700, 50, 600]
    found = corpus.of([text[2000 * n : 2000 * n + size] for n, size in enumerate(sizes * 2)])
    ratios = []
    for _ in range(3):
        work = Work(model, tokenizer, found, list(corpus.DEFAULT), "all", None, None, None, 0)
        lengths = work.lengths(list(range(len(found))))
        guess = work.estimate(lengths.index(max(lengths))).total(lengths)
        begun = time.perf_counter()
        for index in range(len(found)):
            work.record(index)
        ratios.append(guess / (time.perf_counter() - begun))
    assert 0.5 < sorted(ratios)[1] < 2, ratios


def test_what_is_said_before_the_run(
    model: nn.Module, tokenizer: Any, texts: list[str], tmp_path: Path
) -> None:
    said: list[str] = []
    given: Any = (model, tokenizer, corpus.of(texts[:3]), ["entropy"])
    corpus.run(*given, out=tmp_path / "run", say=said.append)
    corpus.run(*given, out=tmp_path / "run", say=said.append)
    tokens = sum(len(tokenizer(text)["input_ids"]) for text in texts[:3])
    assert said[0].startswith(f"3 documents, {tokens} tokens: ")
    assert said[1] == "all 3 documents have been measured; adding up"
    times = [spoken(n) for n in (0.2, 8.4, 200, 9000, 400_000)]
    assert times == ["less than a second", "about 8.4 s", "about 3.3 min", "about 2.5 h",
                     "about 4.6 days"]  # fmt: skip


def test_who_goes_on_takes_the_threads_of_who_began(
    model: nn.Module, tokenizer: Any, texts: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Sums of two threads are added in another order than those of one."""
    from attnbias.observe.corpus.work import Work

    given: Any = (model, tokenizer, corpus.of(texts[:2]), ["entropy"])
    before, used = torch.get_num_threads(), []
    plain = Work.record
    monkeypatch.setattr(
        Work, "record", lambda w, n: (used.append(torch.get_num_threads()), plain(w, n))[1]
    )
    try:
        torch.set_num_threads(2)
        corpus.run(*given, out=tmp_path / "run")
        (tmp_path / "run" / "part-0.jsonl").unlink()
        torch.set_num_threads(1)
        corpus.run(*given, out=tmp_path / "run")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert used == [2, 2, 2, 2]


def test_what_computes_is_a_setting(
    model: nn.Module, tokenizer: Any, texts: list[str], tmp_path: Path
) -> None:
    from attnbias import native

    given: Any = (model, tokenizer, corpus.of(texts[:1]), ["entropy"])
    with native.disabled():
        corpus.run(*given, out=tmp_path / "run")
    if native.available():
        with pytest.raises(AttnbiasError, match=r"with software .*, and now software is .*numba"):
            corpus.run(*given, out=tmp_path / "run")
