"""The page in a real Chromium: charts drawn, values on hover and focus, no request, no attack."""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attnbias.report.files import to_csv
from attnbias.report.page import render
from tests.report import planted
from tests.report.hostile import hostile_data
from tests.report.made import even_data, sink_data

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory) -> Iterator[Any]:
    """A Chromium with a fresh profile, as a function that opens a page of the given width."""
    found = shutil.which("chromium")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("no chromium on the path, and CI is set: the page must be looked at there")
        pytest.skip("no chromium on the path (Debian: apt-get install chromium)")
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        if os.environ.get("CI"):
            raise
        pytest.skip("no chromium driver: the package playwright is not installed (extra dev)")
    with sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp("profile")), executable_path=found, args=list(FLAGS),
            headless=True,
        )  # fmt: skip
        yield context
        context.close()


class Opened:
    """A page that has drawn its charts, with everything it logged, asked for or threw."""

    def __init__(self, context: Any, path: Path, width: int = 1280, scheme: str = "light") -> None:
        self.page = context.new_page()
        self.page.set_viewport_size({"width": width, "height": 900})
        self.page.emulate_media(color_scheme=scheme)
        self.logged: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.logged.append(message.text))
        self.page.on("pageerror", lambda error: self.logged.append(str(error)))
        self.page.on("dialog", lambda dialog: self.logged.append("dialog"))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-drawn]", timeout=30_000)

    def text(self, where: str) -> str:
        return str(self.page.inner_text(where))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where screenshots stay: ATTNBIAS_SCREENSHOTS, or a temporary folder."""
    kept = os.environ.get("ATTNBIAS_SCREENSHOTS")
    path = Path(kept) if kept else tmp_path_factory.mktemp("pages")
    path.mkdir(parents=True, exist_ok=True)
    (path / "plain.html").write_bytes(render(sink_data()))
    (path / "hostile.html").write_bytes(render(hostile_data()))
    return path.resolve()


@pytest.fixture
def plain(chromium, folder) -> Iterator[Opened]:
    opened = Opened(chromium, folder / "plain.html")
    yield opened
    opened.page.close()


MAPS = 3
FIGURES = MAPS + 2  # the ranked words, and this head among all; made data has no profiles


def test_all_charts_are_drawn_and_nothing_is_asked_for(plain, folder):
    assert plain.page.get_attribute("html", "data-drawn") == str(FIGURES)
    assert plain.page.locator(".chart svg").count() == FIGURES
    cells = plain.page.locator("[data-chart='map0'] [aria-roledescription='rect mark']")
    assert cells.count() == 72
    assert plain.logged == []
    assert plain.asked == [(folder / "plain.html").as_uri()]
    picture = folder / "plain.png"
    plain.page.screenshot(path=str(picture), full_page=True)
    assert picture.stat().st_size > 50_000


def test_values_on_hover(plain):
    says = "Layer 1, head 3: 66.0%"
    cell = plain.page.locator(f"[data-chart='map0'] [aria-label='{says}']")
    cell.hover()
    assert plain.text("#map-readout") == f"This text. {says}"
    plain.page.wait_for_selector("#vg-tooltip-element.visible", timeout=5000)
    assert says in plain.text("#vg-tooltip-element")
    plain.page.locator("#words .word").nth(0).hover()
    told = plain.text("#word-readout")
    assert told.startswith("“[CLS]” (word 1): 6.2× its even share")
    assert "words shuffled 6.0× (what stands in its place then 6.0×), random weights 1.0×" in told


def test_values_by_keyboard_alone(plain):
    plain.page.locator("#numbers").focus()
    plain.page.keyboard.press("Tab")
    assert "“[CLS]” (word 1): 6.2×" in plain.text("#word-readout")
    plain.page.keyboard.press("ArrowRight")
    assert "“It” (word 2): 1.0×" in plain.text("#word-readout")
    plain.page.keyboard.press("End")
    assert "“[SEP]”" in plain.text("#word-readout")
    for _ in range(5):  # the ranked words, their two buttons, the list of statistics, a map
        plain.page.keyboard.press("Tab")
    plain.page.keyboard.press("Home")
    plain.page.keyboard.press("ArrowDown")
    for _ in range(4):
        plain.page.keyboard.press("ArrowRight")
    assert plain.text("#map-readout").startswith("This text. Layer 1, head 4: ")
    assert plain.text("#head-title") == "Layer 1, head 3"  # the strongest, at first
    plain.page.keyboard.press("Enter")
    assert plain.text("#head-title") == "Layer 1, head 4"
    chosen = plain.page.locator("#maps .chosen")
    assert chosen.count() == MAPS
    assert chosen.nth(0).get_attribute("aria-label").startswith("Layer 1, head 4: ")
    stops = plain.page.locator("[tabindex='0']:visible").count()
    assert stops < 12  # one for each group, not one for each value


def test_a_click_on_a_head_changes_the_named_figures(chromium, folder):
    from tests.report.made import wide_data

    data = wide_data(3, 4, 20)
    (folder / "short.html").write_bytes(render(data))
    opened = Opened(chromium, folder / "short.html")
    page = opened.page
    names = ("among all heads", "attention received by position", "attention by distance",
             "its map over the tokens")  # fmt: skip
    page.locator("[data-chart='map0'] [aria-label^='Layer 2, head 1:']").click()
    for where, name in zip(("beside", "position", "near", "tokens"), names, strict=True):
        shown = page.locator(f"[data-chart='{where}']")
        shown.scroll_into_view_if_needed()
        joint = " " if where == "beside" else ": "
        drawn = "([where, text]) => document.querySelector(where).textContent.includes(text)"
        place = f"[data-chart='{where}']"
        page.wait_for_function(drawn, arg=[place, f"Layer 2, head 1{joint}{name}"])
    cell = next(c for c in data.maps[0].cells() if (c.layer, c.head) == (2, 1))
    row = page.locator("#head-table tr[data-statistic='first_token']")
    assert row.locator("td").nth(0).inner_text() == f"{cell.values:.1%}"
    assert row.locator("td").nth(2).inner_text() == f"{cell.shuffled:.1%}"
    assert opened.logged == []
    top = page.locator("#head-top li").nth(0).inner_text()
    place, share = data.profile(2, 1).top[0]
    assert top == f"{data.tokens[place]} ({place}) {share:.1%}"
    page.close()


def test_numbers_read_back_equal_the_csv(plain):
    rows = list(csv.DictReader(io.StringIO(to_csv(sink_data()).decode())))
    for number, one in enumerate(sink_data().maps):
        plain.page.select_option("#statistic", index=number)
        shown = plain.page.eval_on_selector_all(
            "#heads-table tbody tr",
            "rows => rows.map(r => [...r.cells].map(c => c.dataset.value ?? c.textContent))",
        )
        wanted = [r for r in rows if r["statistic"] == one.statistic]
        assert len(shown) == len(wanted) == 72
        for cells, row in zip(shown, wanted, strict=True):
            assert cells[:2] == [row["layer"], row["head"]]
            for cell, name in zip(
                cells[2:], ("value", "low", "high", "shuffled", "random", "even"), strict=True
            ):
                if row[name] == "":
                    assert cell == ""
                else:
                    assert float(cell) == pytest.approx(float(row[name]), rel=1e-6)


def test_tables_sort_by_any_column(plain):
    head = plain.page.locator("#heads-table thead th", has_text="this text")
    column = "rows => rows.map(r => Number(r.cells[2].dataset.value))"
    for way, sign in (("descending", -1), ("ascending", 1)):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == way
        found = plain.page.eval_on_selector_all("#heads-table tbody tr", column)
        assert found == sorted(found, key=lambda x: sign * x)
    assert found[-1] == pytest.approx(0.66)


def test_the_list_of_statistics_redraws_the_maps(plain):
    plain.page.select_option("#statistic", label="Entropy")
    assert plain.text("#map-title") == "Entropy"
    plain.page.wait_for_selector("[data-chart='map0'] [aria-label$=' nats']")
    assert "2.56 nats" in plain.text("#map-even")


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_every_figure_is_saved(plain, folder, kind):
    buttons = plain.page.locator(f"[data-save='{kind}']:visible")
    assert buttons.count() == FIGURES
    for n in (0, 1, FIGURES - 1):
        with plain.page.expect_download() as got:
            buttons.nth(n).click()
        path = folder / got.value.suggested_filename
        got.value.save_as(path)
        begin = path.read_bytes()[:300]
        assert begin.startswith(b"\x89PNG") if kind == "png" else b"<svg" in begin
        assert path.stat().st_size > 3000
    assert plain.logged == []


def test_a_planted_previous_token_head_is_named(chromium, folder):
    from attnbias.report.collect import collect

    data = collect(planted.model((1, 2)), planted.tokenizer(), planted.TEXT, name="planted")
    (folder / "planted.html").write_bytes(render(data))
    opened = Opened(chromium, folder / "planted.html")
    card = opened.page.locator(".findings li.strong", has_text="previous token")
    assert "In 1 of 8 heads" in card.inner_text()
    assert "95% interval" in card.inner_text()
    button = card.locator("button")
    assert button.all_inner_texts() == ["layer 1, head 2"]
    opened.page.locator("[data-chart='map0'] [aria-label^='Layer 0, head 0:']").click()
    assert opened.text("#head-title") == "Layer 0, head 0"
    button.click()
    assert opened.text("#head-title") == "Layer 1, head 2"
    assert opened.text("#map-title") == "Attention to the previous token"
    assert "attention to the previous token" in opened.text("#head-says")
    opened.page.close()
    even = collect(planted.model(None), planted.tokenizer(), planted.TEXT, name="even")
    (folder / "even.html").write_bytes(render(even))
    opened = Opened(chromium, folder / "even.html")
    assert opened.text(".verdict").startswith("No strong bias found.")
    assert opened.page.locator(".findings li.strong").count() == 0
    opened.page.close()


def test_two_runs_side_by_side(chromium, folder):
    """The third map is B - A on a scale around zero, the first two share one."""
    other = even_data(model="b-model")
    (folder / "pair.html").write_bytes(render(sink_data(), other))
    opened = Opened(chromium, folder / "pair.html")
    page = opened.page
    value = other.maps[0].values[1][3]
    page.locator("[data-chart='map2'] [aria-label^='Layer 1, head 3:']").hover()
    assert opened.text("#map-readout") == f"B − A. Layer 1, head 3: {100 * (value - 0.66):.1f}%"
    first, second = (
        page.locator(f"[data-chart='map{n}'] .role-legend-label").all_inner_texts() for n in (0, 1)
    )
    assert first == second
    assert page.locator("#words-b .word").count() == len(other.words)
    page.locator("#words-b .word").nth(1).hover()
    assert opened.text("#word-readout-b").startswith("“It” (word 2)")
    assert opened.logged == []
    page.screenshot(path=str(folder / "pair.png"), full_page=True)
    page.close()


def test_a_long_text_is_read_part_by_part(chromium, folder):
    from tests.report.made import wide_data

    data = wide_data(2, 2, 9000)
    (folder / "long.html").write_bytes(render(data))
    opened = Opened(chromium, folder / "long.html")
    parts = opened.page.locator("#sections button")
    assert 50 < parts.count() <= 200
    parts.nth(7).click()
    shown = opened.page.locator("#words .word")
    assert 0 < shown.count() < 400
    shown.nth(0).hover()
    told = opened.text("#word-readout")
    place = int(told.split("(word ")[1].split(")")[0]) - 1
    assert told.startswith(f"“{data.words[place].text}”")
    received = data.words[place].received
    assert f": {received:.2f}×" in told or f": {received:.1f}×" in told
    opened.page.close()


def test_layer_choice_and_numbers(plain):
    word = plain.page.locator("#words .word").nth(0)
    assert "l4" in word.get_attribute("class").split()
    plain.page.select_option("#layer", label="layer 2")
    assert "l5" in word.get_attribute("class").split()
    assert not word.locator("sub").is_visible()
    plain.page.check("#numbers")
    assert word.locator("sub").inner_text() == "9.0×"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_a_narrow_screen_and_is_readable_in_both_schemes(chromium, folder, scheme):
    opened = Opened(chromium, folder / "plain.html", width=390, scheme=scheme)
    page = opened.page
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.screenshot(path=str(folder / f"narrow-{scheme}.png"), full_page=True)
    for where in (
        "p.standing",
        ".soft",
        ".findings small",
        ".count",
        "#words .word",
        "h1",
        "dd",
        "button",
    ):
        assert page.evaluate(CONTRAST, where) >= 4.5, where
    labels = page.evaluate(CONTRAST, ".chart svg .role-axis-label text")
    assert labels >= 4.5
    page.close()


def test_prints_every_word_on_paper(plain):
    plain.page.emulate_media(media="print")
    assert not plain.page.locator("#layer").is_visible()
    assert plain.page.locator("#words .word").nth(3).is_visible()
    assert len(plain.page.pdf()) > 20_000


def test_hostile_text_does_nothing(chromium, folder):
    opened = Opened(chromium, folder / "hostile.html")
    page = opened.page
    for word in page.locator("#words .word").all():
        word.hover()
        word.focus()
    page.select_option("#layer", index=2)
    for cell in page.locator("[data-chart='ranked'] [aria-roledescription='point']").all()[:6]:
        cell.focus()
    page.wait_for_timeout(300)
    assert page.evaluate("window.stolen") is None
    assert opened.logged == []
    assert opened.asked == [(folder / "hostile.html").as_uri()]
    assert page.locator("img, iframe, object, embed").count() == 0
    assert "<script>window.stolen=1</script>" in opened.text("#words")
    page.screenshot(path=str(folder / "hostile.png"), full_page=True)
    page.close()


def test_the_policy_stops_a_script_that_got_in(chromium, folder):
    """The second wall: were the escaping to fail, the page's content policy still holds."""
    page = (folder / "plain.html").read_text("utf-8")
    broken = page.replace(
        "<h1>", "<script>window.stolen=1</script><img src=x onerror=stolen=1><h1>"
    )
    (folder / "broken.html").write_text(broken, "utf-8")
    opened = Opened(chromium, folder / "broken.html")
    assert opened.page.evaluate("window.stolen") is None
    assert any("Content Security Policy" in line for line in opened.logged)
    opened.page.close()


# Smallest contrast ratio (WCAG 2) of the elements of a selector against what lies behind them.
CONTRAST = """where => {
  const numbers = (c) => (c.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = (c) => { const [r, g, b] = c.map((x) => { x /= 255;
    return x <= 0.03928 ? x / 12.92 : Math.pow((x + 0.055) / 1.055, 2.4); });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (e) => { const stack = [];
    for (; e; e = e.parentElement) { const c = numbers(getComputedStyle(e).backgroundColor);
      stack.push(c); if (c.length < 4 || c[3] === 1) break; }
    let under = [255, 255, 255];
    for (const c of stack.reverse()) { const a = c.length < 4 ? 1 : c[3];
      under = under.map((x, i) => a * c[i] + (1 - a) * x); }
    return under; };
  return Math.min(...[...document.querySelectorAll(where)].map((e) => {
    const style = getComputedStyle(e), svg = e instanceof SVGElement;
    const a = light(numbers(svg ? style.fill : style.color).slice(0, 3)), b = light(behind(e));
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); }));
}"""
