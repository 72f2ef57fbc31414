"""A corpus: statistics as means over documents, in a folder that can be stopped and gone on with.

``run`` measures, ``load`` reads what a folder holds, ``each`` gives the documents one by one.
"""

from __future__ import annotations

from attnbias.observe.corpus.documents import Corpus, Document, of, read
from attnbias.observe.corpus.estimate import Estimate
from attnbias.observe.corpus.folder import Record
from attnbias.observe.corpus.merge import each, load
from attnbias.observe.corpus.running import DEFAULT, run
from attnbias.observe.corpus.table import CorpusRow, CorpusTable

__all__ = [
    "DEFAULT",
    "Corpus",
    "CorpusRow",
    "CorpusTable",
    "Document",
    "Estimate",
    "Record",
    "each",
    "load",
    "of",
    "read",
    "run",
]
