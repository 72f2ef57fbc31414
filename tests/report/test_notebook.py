"""Objects in a notebook: their numbers as HTML, no script, nothing of a stranger read as HTML."""

from __future__ import annotations

import html.parser
from dataclasses import replace

import torch

import attnbias as ab
from attnbias.measures import Scores
from attnbias.observe import Row, Table
from attnbias.observe.display import LINES, heads, shade
from tests.report.hostile import ATTACKS, MARK, hostile_data
from tests.report.made import sink_data


class Reader(html.parser.HTMLParser):
    """Tags that were opened and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.said: list[str] = []
        self.handlers: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said.append(data)


def test_a_table_shows_every_head_of_every_statistic():
    rows = [
        Row("text", layer, head, name, layer + head / 10)
        for layer in (0, 3)
        for name in ("entropy", "<b>other</b>")
        for head in range(3)
    ]
    read = Reader(Table(rows)._repr_html_())
    assert read.tags.count("table") == 2
    assert {"script", "b", "img"}.isdisjoint(read.tags)
    said = " ".join(read.said)
    assert "<b>other</b> (text)" in said
    assert read.said.count("3.2") == 2
    gap = Table([Row("text", 0, 1, "x", float("nan"))])._repr_html_()
    assert gap.count("<td></td>") == 1
    assert gap.count("<td>–</td>") == 1


def test_what_was_seen_is_its_table(minilm):
    from attnbias.cli.loading import load

    model, tokenizer, _ = load(str(minilm))
    with torch.no_grad(), ab.observe(model, ["entropy"]) as seen:
        model(**tokenizer("A dog ran over the hill.", return_tensors="pt"))
    assert seen._repr_html_() == seen.table()._repr_html_()
    value = seen.table()[0].value
    assert f">{value:.3g}<" in seen._repr_html_()


def test_scores_name_their_highest_heads():
    samples = torch.tensor([[[0.1, 0.9], [0.3, torch.nan]]])
    read = Reader(Scores("copying", "text", (2, 5), samples)._repr_html_())
    said = " ".join(read.said)
    assert "copying (text), mean of 1 samples" in said
    assert "Highest: layer 2, head 1: 0.9; layer 5, head 0: 0.3" in said
    assert "script" not in read.tags


def test_a_report_says_what_its_page_says():
    read = Reader(sink_data()._repr_html_())
    said = " ".join(read.said)
    assert "In 3 of 72 heads at least 30%" in said
    assert "Same architecture, random weights: 0 of 72 heads" in said
    assert "Attention is not importance" in said
    assert f"SHA-256 {sink_data().text_hash[:16]}" in said
    assert "script" not in read.tags
    long = replace(sink_data(), words=sink_data().words * 50)
    assert "more words" in long._repr_html_()


def test_hostile_text_stays_text():
    read = Reader(hostile_data()._repr_html_())
    assert {"script", "img"}.isdisjoint(read.tags)
    assert read.handlers == []
    assert "".join(read.said).count(MARK) > 5
    table = Reader(Table([Row(ATTACKS[1], 0, 0, ATTACKS[2], 1.0)])._repr_html_())
    assert {"script", "img"}.isdisjoint(table.tags)


def test_long_tables_are_cut_and_say_so():
    found = heads("many", [(str(n), [float(n)]) for n in range(LINES + 7)])
    assert "7 more lines" in found
    assert found.count("<tr>") == LINES + 1
    assert shade(float("nan")) == shade(-1.0) == "rgba(0,114,178,0.00)"
    assert shade(2.0) == shade(1.0) == "rgba(0,114,178,0.50)"
