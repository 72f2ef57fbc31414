"""A report in which every string that a stranger controls is an attack."""

from __future__ import annotations

from dataclasses import replace

from attnbias.report.data import ReportData
from tests.report.made import even_word, sink_data

MARK = "window.stolen=1"
ATTACKS = (
    f"<script>{MARK}</script>",
    f"</script><script>{MARK}</script>",
    f'"><img src=x onerror="{MARK}">',
    f"<!--<script>{MARK}//",
    f"{{{{ {MARK} }}}}",
    f"' onmouseover='{MARK}",
    "https://evil.example/x.png",
    "\u202edesrever\u202c",
    "a\u0000b\u001b[31mred\u0085\u2028\u2029",
    "\ud800lone",
    "\u200f\u2066rtl\u2069\u061c\ufeff",
)
# Written as [U+XXXX] on the page.
INVISIBLE = "\u202e\u202c\u0000\u001b\u0085\u2028\u2029\u200f\u2066\u2069\u061c\ufeff"


def hostile_data() -> ReportData:
    data = sink_data()
    words = tuple(
        even_word(attack, n, special=n == 0, received=9.0 - n / 2, gap=" ")
        for n, attack in enumerate(ATTACKS)
    )
    maps = tuple(replace(one, tower=f"text {ATTACKS[1]}") for one in data.maps)
    return replace(
        data, model=f"evil/{ATTACKS[0]}{ATTACKS[7]}", revision=ATTACKS[1], architecture=ATTACKS[2],
        text=" ".join(ATTACKS), tokens=ATTACKS, words=words, maps=maps,
        layers=tuple((f"text {ATTACKS[1]}", n) for n, _ in enumerate(data.layers)),
        settings=((ATTACKS[3], ATTACKS[5]),),
    )  # fmt: skip
