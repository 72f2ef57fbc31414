"""What `benchmarks.fuse` measures and what it must reach, fixed before the code it measures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks import common

STOCK, FUSED, BARE = "stock", "fused", "bias removed"
LINES = (STOCK, FUSED, BARE)


@dataclass(frozen=True)
class Cell:
    """One size of one model.

    Attributes:
        kind: ``forward``, ``training`` (forward and backward) or ``token`` (decoding after a prompt
            of `size`), by time; with ``memory`` before it by peak resident size.
        seconds: of one call of each of the three lines together on two idle cores, roughly; for
            the estimate and for the number of rounds.
    """

    subject: str
    kind: str
    size: int
    seconds: float

    @property
    def key(self) -> str:
        return f"{self.subject}/{self.kind}/{self.size}"

    @property
    def memory(self) -> bool:
        return self.kind.startswith("memory")


def _cells(subject: str, **kinds: dict[int, float]) -> Iterator[Cell]:
    for kind, sizes in kinds.items():
        for size, seconds in sizes.items():
            yield Cell(subject, kind.replace("_", " "), size, seconds)


GRID: tuple[Cell, ...] = (
    *_cells(
        "T5",
        forward={512: 0.5, 1024: 1.5, 2048: 4.6, 4096: 13, 8192: 40, 16384: 108},
        memory_forward={8192: 40, 16384: 108},
    ),
    *_cells("T5, padded", forward={1024: 5}),
    *_cells(
        "T5, training",
        training={512: 0.9, 1024: 2.5, 4096: 31},
        memory_training={4096: 31},
    ),
    *_cells("T5, decoding", token={512: 0.5, 2048: 0.6}),
    *_cells("MPT", forward={512: 0.5, 1024: 1, 2048: 3, 4096: 10}, token={2048: 0.6},
            memory_forward={4096: 10}),
    *_cells("Bloom", forward={512: 0.4, 1024: 0.8, 2048: 2.5, 4096: 8}, token={2048: 0.6}),
    *_cells("Falcon", forward={512: 0.4, 1024: 0.8, 2048: 2.5, 4096: 8}, token={2048: 0.6},
            memory_forward={4096: 8}),
    *_cells("gpt-oss", forward={512: 0.5, 2048: 3, 4096: 10}, token={2048: 0.8}),
    *_cells("ESMFold", forward={256: 5, 512: 20, 1024: 85}, memory_forward={768: 45}),
    *_cells("Pairformer", forward={256: 4, 512: 18, 1024: 80}, memory_forward={768: 42}),
    *_cells("Swin", forward={224: 0.3, 384: 0.7, 512: 1.3, 1024: 5}, memory_forward={1024: 5}),
    *_cells("Swin v2", forward={224: 0.3, 384: 0.7, 512: 1.2, 1024: 5}),
    *_cells("BEiT", forward={224: 0.3, 384: 0.8, 512: 1.6, 1024: 14}, memory_forward={1024: 14}),
    *_cells("LayoutLMv3", forward={512: 1.3, 1024: 3.5, 2048: 11}),
    *_cells("LongT5", forward={1024: 0.7, 4096: 2.6, 16384: 27}, memory_forward={16384: 27}),
)  # fmt: skip
QUICK: dict[str, int] = {"tokens": 256, "pixels": 224, "residues": 48}  # unit -> size
# Files of families whose code a subject runs; what they import from beside themselves counts, too.
FAMILIES = {
    "T5": "t5", "T5, padded": "t5", "T5, training": "t5", "T5, decoding": "t5", "MPT": "mpt",
    "Bloom": "bloom", "Falcon": "falcon", "gpt-oss": "gpt_oss", "ESMFold": "esmfold",
    "Pairformer": "pairformer", "Swin": "swin", "Swin v2": "swin_v2", "BEiT": "beit",
    "LayoutLMv3": "layoutlmv3", "LongT5": "longt5",
}  # fmt: skip
_FUSE = ("door", "family", "find", "fused", "interface", "modes", "position", "trial")
_CORE = (
    *(f"attnbias/{part}" for part in ("bias", "forms", "hub", "lowering", "native")),
    "attnbias/attention.py",
    *(f"attnbias/fuse/{part}.py" for part in _FUSE),
    *(f"benchmarks/fuse_{part}.py" for part in ("bare", "measure", "models")),
    "benchmarks/timing.py",
)


def fingerprint(subject: str) -> str:
    """Of all code that a subject's numbers depend on: other families are not among it."""
    todo, found = [f"families/{FAMILIES[subject]}"], set[str]()
    while todo:
        name = todo.pop()
        path = common.ROOT / "attnbias" / "fuse" / f"{name}.py"
        if name in found or not path.is_file():
            continue
        found.add(name)
        imported = re.findall(r"attnbias\.fuse\.([\w.]+) import", path.read_text(encoding="utf-8"))
        todo += [one.replace(".", "/") for one in imported]
    parts = sorted(f"attnbias/fuse/{name}.py" for name in found)
    return common.fingerprint(*_CORE, "attnbias/fuse/plain", *parts)


# Goals -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """A limit on one number of some cells.

    Attributes:
        words: for people. measure: name in a cell's `ratios`. limit: at least (`least`) or at most.
        subjects: empty for all. kinds, sizes: which cells (both ends of `sizes` count).
    """

    words: str
    measure: str
    limit: float
    least: bool = False
    subjects: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ("forward",)
    sizes: tuple[int, int] = (0, 1 << 30)

    def covers(self, cell: Cell) -> bool:
        return (
            (not self.subjects or cell.subject in self.subjects)
            and cell.kind in self.kinds
            and self.sizes[0] <= cell.size <= self.sizes[1]
        )

    def holds(self, value: float | None) -> bool:
        if value is None:
            return False
        return value >= self.limit if self.least else value <= self.limit


TIMED = ("forward", "training", "token")
FOLDS = ("ESMFold", "Pairformer")
GOALS: tuple[Goal, ...] = (
    Goal("times faster than stock", "faster", 1.5, True, ("T5",), sizes=(512, 512)),
    Goal("times faster than stock", "faster", 2.5, True, ("T5",), sizes=(1024, 8192)),
    Goal("of the time without the bias", "over_bare", 1.15, False, ("T5",), sizes=(0, 1024)),
    Goal("of the time without the bias", "over_bare", 1.1, False, ("T5",), sizes=(1025, 1 << 30)),
    Goal("of stock's memory", "memory", 0.25, False, ("T5",), ("memory forward",), (8192, 8192)),
    Goal("times faster than stock", "faster", 1.8, True, ("T5, training",), ("training",),
         (4096, 4096)),
    Goal("of stock's memory", "memory", 0.5, False, ("T5, training",), ("memory training",),
         (4096, 4096)),
    Goal("times faster than stock", "faster", 3.0, True, ("MPT", "Bloom", "Falcon"),
         sizes=(4096, 4096)),
    Goal("times faster than stock", "faster", 1.5, True, FOLDS),
    # Bounded: as stock at its best chunk size, and not far from attention that has no bias at all.
    Goal("of stock's memory", "memory", 1.0, False, FOLDS, ("memory forward",)),
    Goal("of the memory without the bias", "memory_over_bare", 1.25, False, FOLDS,
         ("memory forward",)),
    Goal("of stock's time", "slower", 1.03, False, kinds=TIMED),
    Goal("difference from stock's output", "difference", 1e-5, False, kinds=("forward", "token")),
    Goal("difference from stock's gradients", "difference", 1e-4, False, kinds=("training",)),
)  # fmt: skip


def verdicts(groups: dict[str, Any], grid: tuple[Cell, ...] = GRID) -> list[dict[str, Any]]:
    """Every goal at every cell that was measured."""
    found = []
    for goal in GOALS:
        for cell in grid:
            if cell.key not in groups or not goal.covers(cell):
                continue
            value = groups[cell.key].get("ratios", {}).get(goal.measure)
            found.append(
                {
                    "cell": cell.key,
                    "words": goal.words,
                    "measure": goal.measure,
                    "limit": goal.limit,
                    "least": goal.least,
                    "value": value,
                    "holds": goal.holds(value),
                }
            )
    return found
