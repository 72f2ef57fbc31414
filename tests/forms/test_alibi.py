"""ALiBi against the formula written out."""

from __future__ import annotations

import attnbias as ab
from tests.cases.form import Form, FormCase


class TestALiBi(FormCase):
    def build(self) -> Form:
        return ab.forms.ALiBi(self.heads)

    def entry(self, head: int, query: int, key: int) -> float:
        return -(2.0 ** (-8 * (head + 1) / self.heads)) * abs(key - query)


class TestALiBiOfSixHeads(FormCase):
    """Six is no power of two: the slopes of four heads, then every second one of eight."""

    heads = 6

    def build(self) -> Form:
        return ab.forms.ALiBi(self.heads)

    def entry(self, head: int, query: int, key: int) -> float:
        exponent = [2, 4, 6, 8, 1, 3][head]
        return -(0.5**exponent) * abs(key - query)
