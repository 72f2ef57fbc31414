"""A report in a notebook: the summary and the words, as HTML without a script."""

from __future__ import annotations

from html import escape

from attnbias.observe.display import shade
from attnbias.report.data import ReportData

WORDS = 400
FULL = 8.0  # times the even share that has the fullest shade


def shown(data: ReportData) -> str:
    """The verdict, each finding with its controls, and the first words shaded by what they get."""
    from attnbias.report.page import citation, clean
    from attnbias.report.summary import summarise

    digest, one = data.text_hash, clean(data)
    summary = summarise(one)
    findings = "".join(
        f"<li><b>{escape(f.statement)}</b> {escape(f.strongest)} {escape(' '.join(f.controls))} "
        f"{escape(f.interval)} {escape(f.reading)}</li>"
        for f in summary.findings
    )
    words = " ".join(
        f'<span style="background:{shade(word.received / FULL)};padding:0 .15em" '
        f'title="{word.received:.2f} times its even share">{escape(word.text)}</span>'
        for word in one.words[:WORDS]
    )
    more = len(one.words) - WORDS
    left = f"<p>{more} more words; <code>attnbias observe</code> makes a page.</p>"
    return (
        f'<div class="attnbias"><h4>Where the attention of {escape(one.model)} goes</h4>'
        f"<p><b>{escape(summary.verdict)}</b></p><ul>{findings}</ul>"
        f'<p style="line-height:1.8">{words}</p>{left if more > 0 else ""}'
        f"<p><i>{escape(summary.standing)}</i></p>"
        f"<p>{escape(citation(one, digest))}</p></div>"
    )
