"""Journals: what a kill leaves behind, what is refused, what a reader sees."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from attnbias.errors import AttnbiasError
from attnbias.observe.corpus.folder import Folder, Journal, Record, begin, opened

CELLS = (("text", 0, 0, "entropy"), ("text", 0, 1, "entropy"))
SETTINGS = {"model": "tiny", "corpus": {"documents": 9, "sha256": "ab"}, "seed": 0}


def record(document: int, *values: float) -> Record:
    values = values or (document + 0.1, math.nan)
    return Record(document, f"d{document}", 10 + document, CELLS, values)


def fill(folder: Folder, rank: int, documents: range | list[int]) -> None:
    journal = Journal(folder, rank, {"threads": 1})
    for document in documents:
        journal.add(record(document))
    journal.close()


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return begin(tmp_path / "run", SETTINGS)


def documents(folder: Folder) -> list[int]:
    return [one.document for one in folder.records()]


def test_numbers_come_back_to_the_last_bit(folder: Folder) -> None:
    values = (0.1 + 0.2, math.nan, math.inf, -math.inf, 5e-324, -0.0)
    cells = tuple(("text", 0, n, 'share["a", b]\n') for n in range(len(values)))
    journal = Journal(folder, 0, {})
    given = Record(4, "é", 7, cells, values, errors=values)
    journal.add(given)
    journal.close()
    (found,) = folder.records()
    assert repr(found) == repr(given)
    assert "Infinity" not in (folder.path / "part-0.jsonl").read_text()


def test_records_come_in_the_order_of_documents(folder: Folder) -> None:
    fill(folder, 1, [7, 1, 4])
    fill(folder, 0, [8, 0])
    fill(folder, 10, [2])
    fill(folder, 1, [5])
    assert documents(folder) == [0, 1, 2, 4, 5, 7, 8]
    assert [one.values[0] for one in folder.records()] == [n + 0.1 for n in documents(folder)]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_last_line_is_dropped_and_written_over(folder: Folder, cut: int) -> None:
    fill(folder, 0, [0, 1, 2])
    part = folder.path / "part-0.jsonl"
    whole = part.read_bytes()
    part.write_bytes(whole[:-cut])
    assert documents(folder) == [0, 1]
    fill(folder, 0, [2, 3])
    assert documents(folder) == [0, 1, 2, 3]
    assert (
        whole[: whole.rindex(b'{"document": 2')]
        == part.read_bytes()[: len(whole) - 0][: whole.rindex(b'{"document": 2')]
    )


def test_a_page_of_zeros_at_the_end_is_dropped_too(folder: Folder) -> None:
    fill(folder, 0, [0, 1])
    part = folder.path / "part-0.jsonl"
    part.write_bytes(part.read_bytes() + b"\0" * 100)
    assert documents(folder) == [0, 1]
    fill(folder, 0, [2])
    assert documents(folder) == [0, 1, 2]


def test_a_header_cut_off_before_the_first_record(folder: Folder) -> None:
    Journal(folder, 0, {}).close()
    part = folder.path / "part-0.jsonl"
    part.write_bytes(part.read_bytes()[:-5])
    assert documents(folder) == []
    fill(folder, 0, [0])
    assert documents(folder) == [0]


def test_damage_in_the_middle_is_said_and_not_skipped(folder: Folder) -> None:
    fill(folder, 0, [0, 1, 2])
    part = folder.path / "part-0.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join([*lines[:2], lines[2][:-9] + b"\n", *lines[3:]]))
    with pytest.raises(AttnbiasError, match=r"part-0\.jsonl is damaged .*; delete the file"):
        documents(folder)
    part.write_bytes(b"".join([*lines[:2], lines[2].replace(b"0.1", b"0.1, 9"), *lines[3:]]))
    with pytest.raises(AttnbiasError, match=r"damaged .the record of document 0"):
        documents(folder)


def test_a_document_in_two_journals_counts_once(folder: Folder) -> None:
    fill(folder, 0, [0, 1])
    fill(folder, 1, [1, 2])
    assert documents(folder) == [0, 1, 2]


def test_nobody_else_may_write_to_a_journal(folder: Folder) -> None:
    pytest.importorskip("fcntl", reason="file locks: the system has none")
    journal = Journal(folder, 0, {})
    with pytest.raises(AttnbiasError, match="is being written by another run"):
        Journal(folder, 0, {})
    journal.add(record(0))
    journal.close()
    fill(folder, 0, [1])
    assert documents(folder) == [0, 1]


def test_other_settings_are_refused_with_what_differs(folder: Folder) -> None:
    assert begin(folder.path, dict(SETTINGS)).settings == SETTINGS
    other = {**SETTINGS, "corpus": {"documents": 9, "sha256": "cd"}}
    with pytest.raises(AttnbiasError, match=r'with corpus \{.*"ab"\}, and now corpus is \{.*"cd"'):
        begin(folder.path, other)
    with pytest.raises(AttnbiasError, match="with queries null, and now queries is 8"):
        begin(folder.path, {**SETTINGS, "queries": 8})


def test_a_journal_of_another_run_is_refused(folder: Folder, tmp_path: Path) -> None:
    strange = begin(tmp_path / "other", {**SETTINGS, "seed": 1})
    fill(strange, 3, [0])
    (folder.path / "part-3.jsonl").write_bytes((strange.path / "part-3.jsonl").read_bytes())
    with pytest.raises(AttnbiasError, match=r"part-3\.jsonl belongs to a run with other settings"):
        documents(folder)


def test_folders_that_are_no_run(tmp_path: Path) -> None:
    with pytest.raises(AttnbiasError, match=r"holds no corpus run .no run\.json"):
        opened(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(AttnbiasError, match=r"holds 'notes\.txt' and no run\.json"):
        begin(tmp_path, SETTINGS)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(AttnbiasError, match="cannot be written"):
        begin(tmp_path / "notes.txt" / "x", SETTINGS)
    made = begin(tmp_path / "made", SETTINGS)
    for text in ("{", json.dumps({"schema": "x"}), "[]", '{"schema": "attnbias.corpus/1"}'):
        (made.path / "run.json").write_text(text)
        with pytest.raises(
            AttnbiasError, match=r"is not a header of the schema attnbias\.corpus/1"
        ):
            opened(made.path)


def test_a_record_is_on_disk_before_the_next(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    plain = os.fsync

    def counting(file: int) -> None:
        synced.append(len(documents(folder)))
        plain(file)

    journal = Journal(folder, 0, {})
    monkeypatch.setattr(os, "fsync", counting)
    journal.add(record(0))
    journal.add(record(1))
    journal.close()
    assert synced == [1, 2]
