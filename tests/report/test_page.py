"""The page: whole, small, alone, and deaf to what a text tries."""

from __future__ import annotations

import array
import base64
import html.parser
import io
import json
import re
from dataclasses import replace

import pytest

from attnbias import AttnbiasError
from attnbias.report import ReportData
from attnbias.report.clean import visible
from attnbias.report.page import clean, in_script, png, render
from tests.report.hostile import ATTACKS, INVISIBLE, MARK, hostile_data
from tests.report.made import sink_data, wide_data

LOADING = {"src", "href", "srcset", "data", "action", "poster", "background", "formaction"}
VOID = {"meta", "br", "input", "link", "img"}


class Reader(html.parser.HTMLParser):
    """Elements, attributes and text of a page, with what could load or run."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.loads: list[tuple[str, str, str]] = []
        self.handlers: list[str] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.policy = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")
        if tag == "meta" and ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = dict(attrs)["content"] or ""
        for name, value in attrs:
            if name in LOADING:
                self.loads.append((tag, name, value or ""))
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        else:
            self.text.append(data)


@pytest.fixture(scope="module")
def page() -> str:
    return render(sink_data()).decode()


@pytest.fixture(scope="module")
def attacked() -> str:
    return render(hostile_data()).decode()


def test_is_one_small_file_with_everything_in_it(page):
    assert 500_000 < len(page.encode()) < 3_000_000
    read = Reader(page)
    assert not read.open
    shown = " ".join(" ".join(read.text).split())
    for needed in ("In 3 of 72 heads", "Attention is not importance", "Even share", "SHA-256",
                   "attnbias observe a-model", "layer 1, head 3, 66%"):  # fmt: skip
        assert needed in shown
    charts = re.findall(r'data-chart="(\w+)"', page)
    assert charts == ["ranked", "map0", "map1", "map2", "beside"]
    assert re.findall(r"<option value=.*?>(.*?)</option>", page)[-3:] == [
        "Attention to the first token", "Entropy", "Mean distance",
    ]  # fmt: skip


def test_says_when_nothing_was_found():
    from tests.report.made import even_data

    assert "No strong bias found." in render(even_data()).decode()


@pytest.mark.parametrize("which", ["page", "attacked"])
def test_nothing_is_loaded_from_anywhere(which, request):
    text = request.getfixturevalue(which)
    read = Reader(text)
    assert [load for load in read.loads if not load[2].startswith("#")] == []
    assert "default-src 'none'" in read.policy
    assert read.policy.count("'sha256-") == 2
    assert "unsafe-eval" not in read.policy
    assert "script-src 'unsafe" not in read.policy
    styles = re.findall(r"<style>(.*?)</style>", text, re.S)
    assert styles
    assert not any("url(" in style or "@import" in style for style in styles)


def test_hostile_text_adds_no_element(page, attacked):
    mine, theirs = Reader(page), Reader(attacked)
    assert len(theirs.scripts) == len(mine.scripts) == 3
    assert mine.scripts[1:] == theirs.scripts[1:]  # library and our own script, byte for byte
    assert "img" not in theirs.tags
    assert theirs.handlers == []
    assert not theirs.open
    shown = "".join(theirs.text)
    assert shown.count(MARK) > 10  # it is there, as text


def test_chart_data_cannot_end_its_script(attacked):
    block = Reader(attacked).scripts[0]
    assert not re.search(r"[<>&\u2028\u2029]", block)
    data = json.loads(block)
    assert data["runs"][0]["words"]["text"][0] == ATTACKS[0]
    assert json.loads(in_script({"a": "</script>&\u2028"})) == {"a": "</script>&\u2028"}


def test_invisible_characters_are_shown(attacked):
    for char in INVISIBLE:
        assert char not in attacked
        assert f"[U+{ord(char):04X}]" in attacked
        assert f"\\u{ord(char):04x}" not in Reader(attacked).scripts[0]
    assert "[U+D800]" in attacked
    assert visible("ä ß 語 \n\t नमस्ते") == "ä ß 語 \n\t नमस्ते"


def test_cleaning_reaches_every_string():
    def strings(value):
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            for one in value.values():
                yield from strings(one)
        elif isinstance(value, (list, tuple)):
            for one in value:
                yield from strings(one)

    found = list(strings(clean(hostile_data()).as_dict()))
    assert not any(char in text for text in found for char in INVISIBLE)
    assert any(char in text for text in strings(hostile_data().as_dict()) for char in INVISIBLE)


def test_equal_data_give_equal_bytes(page):
    assert render(sink_data()).decode() == page


def test_hash_is_of_the_text_as_it_came():
    data: ReportData = hostile_data()
    assert data.text_hash in render(data).decode()


def test_png_is_a_picture_with_something_on_it():
    from PIL import Image

    for data in (sink_data(), hostile_data()):
        image = Image.open(io.BytesIO(png(data, scale=1))).convert("L")
        assert image.width > 600
        assert image.height > 400
        assert len(set(image.resize((200, 120)).tobytes())) > 20


@pytest.mark.parametrize(
    ("layers", "heads", "tokens"), [(12, 12, 512), (12, 12, 128), (12, 12, 32_768)]
)
def test_a_page_has_at_most_ten_megabytes(layers, heads, tokens):
    data = wide_data(layers, heads, tokens)
    found = render(data)
    assert len(found) <= 10_000_000
    packed = json.loads(Reader(found.decode()).scripts[0])["runs"][0]
    assert len(packed["stats"]) == len(data.maps)
    assert len(base64.b64decode(packed["profiles"]["top_place"])) == layers * heads * 64 * 4
    assert len(packed["words"]["text"]) == tokens  # nothing of the text is left out
    assert bool(packed["maps"] and packed["maps"][0]) == (tokens <= 128)


def test_what_does_not_fit_is_left_out_finest_first(monkeypatch):
    """At a thousand heads and a book of words, with the limit lowered."""
    from attnbias.report import page

    data = wide_data(16, 16, 120)
    whole = render(data)
    monkeypatch.setattr(page, "LARGEST", len(whole) - 1)
    small = page.render(data)
    assert len(small) < len(whole)
    packed = json.loads(Reader(small.decode()).scripts[0])["runs"][0]
    assert packed["maps"] == []
    assert len(packed["words"]["text"]) == 120
    assert "Left out to keep the page small" in small.decode()
    assert "Left out to keep the page small" not in whole.decode()
    monkeypatch.setattr(page, "LARGEST", 1000)
    with pytest.raises(AttnbiasError, match="layers"):
        page.render(data)


def test_packed_numbers_are_those_of_the_report():
    data = wide_data(2, 3, 20)
    packed = json.loads(Reader(render(data).decode()).scripts[0])["runs"][0]
    values = array.array("f", base64.b64decode(packed["stats"][0]["pack"]))
    one = data.maps[0]
    grids = (one.values, one.shuffled, one.random, one.low, one.high)
    wanted = [x for grid in grids for row in grid for x in row]
    assert values.tolist() == pytest.approx(wanted, rel=1e-6)
    near = array.array("H", base64.b64decode(packed["profiles"]["near"]))
    wanted = [x for profile in data.profiles for x in profile.near]
    assert [(x / 65535) ** 2 for x in near] == pytest.approx(wanted, abs=2e-5)


def test_figures_as_files():
    from attnbias.report.page import figures, svg

    data = replace(sink_data(), maps=sink_data().maps[:1])
    found = figures(data, scale=1)
    assert sorted(found) == [
        "first-token.png", "first-token.svg", "words.png", "words.svg",
    ]  # fmt: skip
    assert all(one.startswith(b"\x89PNG") for name, one in found.items() if name.endswith("png"))
    assert b"<svg" in svg(hostile_data())
    assert b"<script" not in svg(hostile_data())


def test_the_citation_names_model_revision_text_and_version(page):
    assert f"(SHA-256 {sink_data().text_hash[:16]}…), measured with attnbias 0.1.0." in page
    count = len(sink_data().tokens)
    assert f"Attention of a-model ({'0' * 40}) on a text of {count} tokens" in page
