"""How large a page of attention is and how soon Chromium has drawn it, by layers, heads and tokens.

    python -m benchmarks.page [--quick]

The numbers are made up (`tests/report/made.py`), every field of the report is filled. Each page is
opened in fresh tabs of one Chromium; the time is the page's own clock from the start of navigation
until every figure is drawn. Beside it the processor time of the tab, which other work on the
machine does not change.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnbias.report.page import LARGEST, render
from benchmarks import common
from tests.report.made import wide_data

MODULE = "benchmarks.page"
SIZES = ((12, 12, 512), (12, 12, 128), (12, 12, 4096), (12, 12, 32_768), (32, 32, 32_768))
QUICK = ((2, 2, 64),)
GOAL = (12, 12, 512)
SECONDS = 2.0
ROUNDS = 5


def opened(paths: Sequence[Path], rounds: int) -> list[dict[str, Any]]:
    """Medians over the rounds: seconds until drawn and first painted, processor seconds."""
    from playwright.sync_api import sync_playwright

    found: list[list[dict[str, float]]] = [[] for _ in paths]
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        for turn in range(rounds + 1):
            for number, path in enumerate(paths):
                took = _once(browser, path)
                if turn:  # the first round warms up
                    found[number].append(took)
        browser.close()
    return [
        {name: round(statistics.median(one[name] for one in rows), 3) for name in rows[0]}
        for rows in found
    ]


def _once(browser: Any, path: Path) -> dict[str, float]:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-drawn]", timeout=60_000)
    measured = {m["name"]: m["value"] for m in session.send("Performance.getMetrics")["metrics"]}
    painted = page.evaluate("performance.getEntriesByType('paint')[0].startTime")
    drawn = float(page.get_attribute("html", "data-seconds"))
    page.context.close()
    return {"drawn_s": drawn, "painted_s": painted / 1000, "cpu_s": measured["ProcessTime"]}


def main(arguments: Sequence[str]) -> int:
    """Make, open, write the result; returns 1 where the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one tiny page")
    quick = parser.parse_args(arguments).quick
    if shutil.which("chromium") is None:
        print("no chromium on the path: nothing is measured")
        return 0
    started, began = common.now(), time.perf_counter()
    sizes = QUICK if quick else SIZES
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for layers, heads, tokens in sizes:
            path = Path(folder) / f"{layers}-{heads}-{tokens}.html"
            path.write_bytes(render(wide_data(layers, heads, tokens)))
            paths.append(path)
        times = opened(paths, 1 if quick else ROUNDS)
        pages = [
            {"layers": a, "heads": b, "tokens": c, "bytes": path.stat().st_size, **took}
            for (a, b, c), path, took in zip(sizes, paths, times, strict=True)
        ]
    head = common.header(
        MODULE, list(arguments), seeds={"numbers": 5}, started=started,
        seconds=time.perf_counter() - began,
    )  # fmt: skip
    load = round(os.getloadavg()[0], 1)
    small = all(one["bytes"] <= LARGEST for one in pages)
    goal = [one for one in pages if (one["layers"], one["heads"], one["tokens"]) == GOAL]
    soon = all(one["drawn_s"] <= SECONDS for one in goal)
    rows = [
        (f"{p['layers']} x {p['heads']} x {p['tokens']:,}", f"{p['bytes'] / 1e6:.1f} MB",
         f"{p['painted_s']:.2f} s", f"{p['drawn_s']:.2f} s", f"{p['cpu_s']:.2f} s")
        for p in pages
    ]  # fmt: skip
    columns = ("layers x heads x tokens", "size", "first paint", "all drawn", "processor time")
    table = common.markdown_table(columns, rows)
    told = (
        f"# Pages of attention\n\n{common.header_markdown(head)}\n- load of the machine: {load}\n\n"
        f"{table}\n\nGoal: at most 10 MB ({'met' if small else 'missed'}); all drawn within "
        f"{SECONDS:g} s at {GOAL[0]} x {GOAL[1]} x {GOAL[2]} ({'met' if soon else 'missed'}).\n"
    )
    print(told)
    if not quick:
        path = common.recorded_or_scratch("page.json", common.machine())
        result = {**head, "load": load, "goal_s": SECONDS, "pages": pages}
        common.write_result(path, result, told)
    return 0 if small and soon else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
