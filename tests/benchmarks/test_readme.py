"""The numbers in the README are those of the recorded results."""

from __future__ import annotations

from benchmarks import readme


def test_the_readme_says_what_was_measured() -> None:
    text = readme.README.read_text(encoding="utf-8")
    assert readme.filled(text) == text, "run `python -m benchmarks.readme`"
    assert "not measured" not in readme.table()
