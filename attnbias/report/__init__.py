"""Pages and plots: what the statistics of one text say, in words, numbers and pictures.

`collect` measures a text and its two controls, `summarise` puts the findings in words, `page` makes
one self-contained HTML page, `figure` a PNG. Needs the extra `report`; loaded only when named.
"""

from __future__ import annotations

from attnbias.report.data import Map, ReportData, Word
from attnbias.report.summary import Finding, Summary, summarise

__all__ = ["Finding", "Map", "ReportData", "Summary", "Word", "summarise"]
