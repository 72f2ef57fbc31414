"""Every work the library covers: its objects, its claim, its evidence, and the marks earned.

One JSON file per work lies in `catalogue/works/`. What a work has earned (`marks`) is computed
from the tests and result files of the repository by `attnbias.catalogue.marks`, never typed, and
kept in `catalogue/marks.json` so that an installed package knows it too.
"""

from __future__ import annotations

from attnbias.catalogue.rows import Work, work, works

__all__ = ["Work", "work", "works"]
