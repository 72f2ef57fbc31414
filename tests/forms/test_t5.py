"""T5's bias, its buckets found by comparing whole numbers instead of by logarithms."""

from __future__ import annotations

import torch

import attnbias as ab
from tests.cases.form import Form, FormCase


def bucket(distance: int, buckets: int, far: int, both: bool) -> int:
    """The bucket of ``key - query``. A distance of ``exact`` or more lies ``s`` logarithmic steps
    above it when ``(distance / exact) ^ steps >= (far / exact) ^ s``."""
    base = 0
    if both:
        buckets //= 2
        base = buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return base + distance
    steps = buckets - exact
    reached = [s for s in range(steps) if distance**steps * exact**s >= exact**steps * far**s]
    return base + exact + max(reached)


class TestT5Encoder(FormCase):
    buckets, far, both = 32, 128, True

    def table(self) -> torch.Tensor:
        draw = torch.Generator().manual_seed(3)
        return torch.randn(self.buckets, self.heads, generator=draw)

    def build(self) -> Form:
        return ab.forms.T5(
            self.heads,
            buckets=self.buckets,
            max_distance=self.far,
            bidirectional=self.both,
            table=self.table(),
        )

    def entry(self, head: int, query: int, key: int) -> float:
        if not hasattr(self, "_rows"):
            self._rows = self.table().tolist()
        return self._rows[bucket(key - query, self.buckets, self.far, self.both)][head]


class TestT5Decoder(TestT5Encoder):
    both = False


class TestT5FewBuckets(TestT5Encoder):
    buckets, far = 8, 20
