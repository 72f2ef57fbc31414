"""Every kernel compiled for cards that are not there: does it fit, and what does it issue?

python -m benchmarks.kernels [--card NAME ...] [--case TEXT ...] [--minutes M]     (make kernels)

Each case is a problem whose forward and backward passes are compiled for sm_80, sm_90, sm_100 and
gfx942 (`attnbias.kernels.offline`) and not run. Of each kernel are recorded the registers, the
bytes of registers kept in memory, the shared memory, and on NVIDIA the instructions that a thread
issues for a score in the shortest loop that makes exponentials: the one over whole tiles. Beside
the same kernel without a bias that is what a bias adds. Written to
benchmarks/results/kernels.json and .md; what is known for the same kernels is not compiled again.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch

import attnbias as ab
from attnbias.bias import Bias
from attnbias.kernels import offline
from benchmarks.common import (
    RESULTS,
    ROOT,
    header,
    header_markdown,
    markdown_table,
    now,
    write_json,
    write_text,
)

N, HEADS, SIDE = 1024, 4, 32
HALF, FULL = torch.bfloat16, torch.float32
CARDS = ("sm_90", "sm_80", "sm_100", "gfx942")
TITLE = "Kernels, compiled"


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


def ids(spread: bool) -> torch.Tensor:
    """Four packed sequences, or their ids scattered."""
    place = torch.arange(N)
    return place % 4 if spread else place // (N // 4)


# What is added to the scores, by name; None: nothing.
BIASES: dict[str, Callable[[], Bias | None]] = {
    "none": lambda: None,
    "causal": lambda: ab.Causal(N, N),
    "key": lambda: ab.KeyBias(draw(1, 1, N)),
    "relative": lambda: ab.Relative(draw(HEADS, 2 * N - 1), queries=N, keys=N),
    "low rank 4": lambda: ab.LowRank(draw(HEADS, N, 4), draw(HEADS, N, 4)),
    "low rank 16": lambda: ab.LowRank(draw(HEADS, N, 16), draw(HEADS, N, 16)),
    "dense, bfloat16": lambda: ab.Dense(torch.randn(1, HEADS, N, N).to(HALF).requires_grad_()),
    "dense, float32": lambda: ab.Dense(draw(1, HEADS, N, N)),
    "grid": lambda: ab.GridRelative(draw(HEADS, 2 * SIDE - 1, 2 * SIDE - 1), (SIDE, SIDE)),
    "classes": lambda: ab.Bucketed(
        draw(1, HEADS, 4, 4), ids(False)[None, None], ids(True)[None, None]
    ),
    "packed segments": lambda: ab.Segments(ids(False), ids(False)),
    "scattered segments": lambda: ab.Segments(ids(True), ids(True)),
    "padding": lambda: ab.Padding(torch.arange(N)[None] < 1000),
    "neighborhood": lambda: ab.Neighborhood((SIDE, SIDE), 7),
    "squared distance": lambda: ab.Distance(
        torch.randn(N, 2), torch.randn(N, 2), ab.radial.Squared(draw(HEADS))
    ),
    "RBF, five terms": lambda: ab.Distance(
        torch.randn(N, 2),
        torch.randn(N, 2),
        ab.radial.RBF(draw(HEADS, 5), torch.rand(HEADS, 5, requires_grad=True)),
    ),
    "RBF in space and time": lambda: (
        ab.Distance(
            torch.randn(N, 2),
            torch.randn(N, 2),
            ab.radial.RBF(draw(HEADS, 5), torch.rand(HEADS, 5, requires_grad=True)),
        )
        + ab.Distance(
            torch.randn(N),
            torch.randn(N),
            ab.radial.RBF(draw(HEADS, 3), torch.rand(HEADS, 3, requires_grad=True)),
            metric="time",
        )
    ),
    "great circle": lambda: ab.Distance(
        torch.rand(N, 2), torch.rand(N, 2), ab.radial.Scalar(draw(HEADS)), metric="great_circle"
    ),
    "key and relative": lambda: (
        ab.KeyBias(draw(1, 1, N)) + ab.Relative(draw(HEADS, 2 * N - 1), queries=N, keys=N)
    ),
}


@dataclass(frozen=True)
class Case:
    """One problem; queries: of them, fewer for decoding; `learn`: with the backward pass."""

    bias: str
    dtype: torch.dtype = HALF
    size: int = 64
    width: int = 64
    queries: int = N
    groups: int = HEADS
    dropout: float = 0.0
    learn: bool = True

    @property
    def name(self) -> str:
        words = [self.bias, str(self.dtype).removeprefix("torch."), f"d {self.size}"]
        words += [f"d_v {self.width}"] * (self.width != self.size)
        words += [f"{self.queries} queries"] * (self.queries != N)
        words += [f"{self.groups} key heads"] * (self.groups != HEADS)
        return ", ".join(words + ["dropout"] * (self.dropout > 0))

    def compile(self) -> None:
        """Launches its kernels, inside of `offline.compiling`."""
        bias = BIASES[self.bias]()
        if bias is not None and self.queries != N:
            bias = bias[:, :, N - self.queries :, :]
        query = torch.randn(2, HEADS, self.queries, self.size, dtype=self.dtype)
        key = torch.randn(2, self.groups, N, self.size, dtype=self.dtype)
        value = torch.randn(2, self.groups, N, self.width, dtype=self.dtype)
        given = [t.requires_grad_(self.learn) for t in (query, key, value)]
        with contextlib.nullcontext() if self.learn else torch.no_grad():
            found = ab.attention(
                *given, bias=bias, dropout=self.dropout, lowering="triton", return_lse=True
            )
            if self.learn:
                torch.autograd.backward(found, [torch.ones_like(t) for t in found])


def cases() -> list[Case]:
    """All that are compiled: each structure at d 64, then formats and head sizes."""
    sizes = [(16, 16), (32, 32), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)]
    return [
        *(Case(name) for name in BIASES),
        Case("key and relative", dropout=0.1),
        Case("none", groups=1),
        *(Case("none", queries=1, groups=g, learn=False) for g in (1, HEADS)),
        Case("key and relative", queries=1, groups=1, learn=False),
        *(Case(name, HALF, d, w) for d, w in sizes for name in ("none", "key and relative")),
        *(Case("key and relative", torch.float16, d, d) for d in (64, 128)),
        *(Case("none", FULL, d, d) for d in (32, 64, 128, 256)),
        *(Case("key and relative", FULL, d, d) for d in (32, 64, 128, 256)),
    ]  # fmt: skip


def _quiet() -> None:
    """In each process that compiles: no more threads than one."""
    torch.set_num_threads(1)


def sources() -> str:
    """Changes when what is compiled may."""
    folders = [ROOT / "attnbias" / "kernels", ROOT / "attnbias" / "lowering"]
    files = [f for folder in folders for f in sorted(folder.glob("*.py"))]
    kept = [f for f in files if f.parent.name == "kernels" or f.stem.startswith("triton")]
    return hashlib.sha256(b"".join(f.read_bytes() for f in kept)).hexdigest()[:16]


def compiled(case: Case, card: offline.Card) -> list[dict[str, Any]]:
    """What became of the kernels of a case; a kernel that could not be compiled says why."""
    torch.manual_seed(0)
    why = ""
    with offline.compiling(card) as found:
        try:
            case.compile()
        except Exception as error:
            why = f"{type(error).__name__}: {str(error).strip()[:300]}"
    rows = []
    for one in found:
        row = {k: v for k, v in asdict(one).items() if k != "binary"}
        row["fits"] = one.fits
        if card.backend == "cuda" and one.tile is not None:
            text = offline.code_of(one)
            row["hot"] = offline.kept_in_memory(text)
            counts = offline.loops(text)
            row["loops"] = [offline.per_score(one, c) for c in counts]
        rows.append(row)
    return [*rows, {"kernel": "?", "card": card.name, "error": why}] if why else rows


# The report ---------------------------------------------------------------------------------------


def _fits(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    found = []
    for row in rows:
        if "error" in row:
            found.append([row["card"], row["case"], row["error"], *[""] * 7])
            continue
        tile = "" if row["tile"] is None else "{} x {}".format(*row["tile"])
        shared = f"{row['shared'] / 1024:.0f}"
        said = "yes" if row["fits"] else "**no**"
        found.append(
            [row["card"], row["case"], f"`{row['kernel']}`", tile, str(row["warps"]),
             str(row["registers"]), str(row["spilled"]), str(row.get("hot", "")), shared, said]
        )  # fmt: skip
    return found


def _slots(rows: Sequence[dict[str, Any]], card: str) -> list[list[str]]:
    """Instructions per score at d 64 in bfloat16, and what each structure adds."""
    here: dict[str, dict[str, float]] = {}
    kinds: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row["card"] == card and row.get("loops") and row["case"].endswith("bfloat16, d 64"):
            name = row["case"].split(", bfloat16, d 64")[0]
            here.setdefault(row["kernel"], {})[name] = sum(row["loops"][0].values())
            kinds[row["kernel"], name] = row["loops"][0]
    found = []
    for kernel, totals in here.items():
        for name, total in totals.items():
            plain = totals.get("none")
            added = "" if plain is None or name == "none" else f"{total - plain:+.1f}"
            parts = kinds[kernel, name]
            shown = [f"{parts[k]:.2f}" for k in (*offline.KINDS, "integers")]
            found.append([f"`{kernel}`", name, f"{total:.1f}", added, *shown])
    return found


def write(known: dict[str, Any], started: str, seconds: float) -> None:
    state = sources()  # what was compiled from other sources is left out
    rows = [
        {"case": case, **row}
        for case, made in known["cases"].items()
        for row in made["rows"]
        if made["states"].get(row["card"]) == state
    ]
    made = [row for row in rows if "error" not in row]
    fit = sum(row["fits"] for row in made)
    bad = [row for row in rows if "error" in row or not row["fits"]]
    how = header("benchmarks.kernels", [], seeds={"torch": 0}, started=started, seconds=seconds)
    write_json(RESULTS / "kernels.json", {**how, "kernels": rows})
    cards = [name for name in offline.CARDS if any(row["card"] == name for row in rows)]
    text = [
        f"# {TITLE}",
        header_markdown(how),
        "Compiled for cards that were not there, never run: what fits, not what is fast. "
        f"{len(made)} kernels for {', '.join(cards)}; {fit} keep all registers on chip and fit the "
        "shared memory of their card. Spilled: bytes of registers that a thread keeps in memory; "
        "in loops: instructions that touch them inside of a loop over tiles (NVIDIA).",
    ]
    for card in cards:
        slots = _slots(rows, card)
        if slots:
            columns = ["kernel", "bias", "in all", "more than none", *offline.KINDS, "integers"]
            text += [
                f"## Instructions that a thread issues for a score, {card}, bfloat16, d 64",
                "The shortest loop that makes exponentials, of a kernel by tiles.",
                markdown_table(columns, slots),
            ]
    columns = ["card", "case", "kernel", "tile", "warps", "registers", "spilled, bytes", "in loops",
               "shared, kB", "fits"]  # fmt: skip
    if bad:
        text += ["## What does not fit", markdown_table(columns, _fits(bad))]
    text += ["## All", markdown_table(columns, _fits(rows))]
    write_text(RESULTS / "kernels.md", "\n\n".join(text) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Compile what is asked for and not yet known, and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--card", action="append", choices=[*offline.CARDS], help=f"default: {' '.join(CARDS)}"
    )
    parser.add_argument("--case", action="append", help="cases whose names contain this")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin nothing after that")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--fresh", action="store_true", help="compile again what is known")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument(
        "--quick", action="store_true", help="one card, begin nothing after a minute"
    )
    args = parser.parse_args(argv)
    if args.quick:
        args.card, args.minutes = args.card or ["sm_90"], min(args.minutes, 1.0)
    wanted = [c for c in cases() if not args.case or any(part in c.name for part in args.case)]
    if args.list:
        print("\n".join(case.name for case in wanted))
        return 0
    kept = Path(ROOT, "out", "kernels.json")
    kept.parent.mkdir(exist_ok=True)
    known = json.loads(kept.read_text("utf-8")) if kept.is_file() else {"cases": {}}
    started, begun, state = now(), time.monotonic(), sources()
    todo = [
        (card, case)
        for card in args.card or CARDS
        for case in wanted
        if args.fresh or known["cases"].get(case.name, {}).get("states", {}).get(card) != state
    ]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=spawn, initializer=_quiet) as pool:
        running = {
            pool.submit(compiled, case, offline.CARDS[card]): (card, case) for card, case in todo
        }
        for done in as_completed(running):
            if done.cancelled():
                continue
            card, case = running[done]
            rows = done.result()
            entry = known["cases"].setdefault(case.name, {"rows": [], "states": {}})
            entry["rows"] = [row for row in entry["rows"] if row["card"] != card] + rows
            entry["states"][card] = state
            bad = [r.get("error") or r["kernel"] for r in rows if "error" in r or not r["fits"]]
            print(f"{card}, {case.name}: {len(rows)} kernels {bad or ''}", flush=True)
            kept.write_text(json.dumps(known), "utf-8")
            if time.monotonic() - begun > 60 * args.minutes:
                for left in running:
                    left.cancel()
    write(known, started, time.monotonic() - begun)
    return 0


if __name__ == "__main__":
    sys.exit(main())
