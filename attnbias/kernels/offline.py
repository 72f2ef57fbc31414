"""Kernels compiled for cards that are not there, and what the compilers made of them.

Problems are computed by the lowering on the CPU with launches replaced by compilation, so that what
is compiled is what would be launched, with the same constants and alignment: for NVIDIA's sm_80,
sm_90 and sm_100 and AMD's gfx942. Read are registers, bytes of spilled registers and shared memory,
and on NVIDIA the instructions of the inner loops. Nothing is run: this says that kernels fit and
what they issue, not how fast they are. `python -m benchmarks.kernels` makes the tables.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attnbias import kernels


@dataclass(frozen=True)
class Card:
    """A target of the compiler; shared: bytes of shared memory that a program may have."""

    name: str
    backend: str
    arch: Any
    warp: int
    shared: int
    number: int


CARDS = {
    card.name: card
    for card in (
        Card("sm_80", "cuda", 80, 32, 163 * 1024, 0),
        Card("sm_90", "cuda", 90, 32, 227 * 1024, 1),
        Card("sm_100", "cuda", 100, 32, 227 * 1024, 2),
        Card("gfx942", "hip", "gfx942", 64, 64 * 1024, 3),
        Card("sm_89", "cuda", 89, 32, 99 * 1024, 4),
        Card("sm_120", "cuda", 120, 32, 99 * 1024, 5),
    )
}


@dataclass(frozen=True)
class Compiled:
    """One kernel on one card. spilled: bytes of a thread kept in memory for want of registers;
    seconds: to compile; tile: rows and keys of a tile, where the kernel has such.
    """

    kernel: str
    card: str
    registers: int
    spilled: int
    shared: int
    warps: int
    seconds: float
    tile: tuple[int, int] | None
    binary: bytes = dataclasses.field(repr=False, default=b"")

    @property
    def fits(self) -> bool:
        return not self.spilled and self.shared <= CARDS[self.card].shared


class _Driver:
    """Stands for the driver of a card."""

    def __init__(self, card: Card) -> None:
        from triton.backends.compiler import GPUTarget

        self.card = card
        self.target = GPUTarget(card.backend, card.arch, card.warp)

    def get_current_device(self) -> int:
        return self.card.number

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


@contextlib.contextmanager
def compiling(card: Card) -> Iterator[list[Compiled]]:
    """Inside, kernels that are launched are compiled for a card and not run; each that is new is
    put on the list. Results of computations are of no use there.
    """
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    if kernels.interpreted():
        raise RuntimeError("kernels are compiled only without TRITON_INTERPRET=1")
    found: list[Compiled] = []
    seen: set[str] = set()
    plain, runs_on, hip = JITFunction.run, kernels.runs_on, torch.version.hip

    def compile_only(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        begun = time.perf_counter()
        made = plain(function, *args, grid=grid, warmup=True, **options)
        if made.hash not in seen:
            seen.add(made.hash)
            tile = (options["ROWS"], options["COLS"]) if {"ROWS", "COLS"} <= {*options} else None
            seconds = time.perf_counter() - begun
            found.append(_read(function.__name__, card, made, seconds, tile))
        return made

    driver.set_active(_Driver(card))
    JITFunction.run = compile_only
    kernels.runs_on = lambda device: ""
    torch.version.hip = None if card.backend == "cuda" else "offline"
    try:
        yield found
    finally:
        JITFunction.run = plain
        kernels.runs_on = runs_on
        torch.version.hip = hip


def _read(
    name: str, card: Card, made: Any, seconds: float, tile: tuple[int, int] | None
) -> Compiled:
    warps, shared = made.metadata.num_warps, made.metadata.shared
    if card.backend == "hip":
        text = made.asm["amdgcn"]
        registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[-1])
        spilled = 4 * int(re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)[-1])
        binary = text.encode()
    else:
        binary = made.asm["cubin"]
        said = tool("cuobjdump", "-res-usage", binary=binary)
        registers, spilled = (int(n) for n in re.findall(r"REG:(\d+) STACK:(\d+)", said)[-1])
    return Compiled(name, card.name, registers, spilled, shared, warps, seconds, tile, binary)


def tool(name: str, *options: str, binary: bytes) -> str:
    """What a tool of NVIDIA's that Triton brings says of a binary."""
    import triton

    where = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(binary)
        done = subprocess.run([where, *options, path], capture_output=True, text=True, check=True)
    return done.stdout


# Inner loops --------------------------------------------------------------------------------------

# What an instruction occupies, by the beginning of its name; the first that fits.
KINDS = {
    "products": ("HMMA", "HGMMA", "UTC", "IMMA", "QGMMA"),
    "exponentials": ("MUFU",),
    "memory": ("LD", "ST", "ATOM", "RED", "UTMA", "UBLKCP", "TLD"),
    "order": ("BAR", "WARP", "DEPBAR", "SYNCS", "FENCE", "MEMBAR", "NOP", "BRA", "R2P", "ELECT"),
    "floats": ("F", "H", "MUL"),
}


def kind_of(operation: str) -> str:
    for kind, starts in KINDS.items():
        if operation.startswith(starts):
            return kind
    return "integers"


def instructions(text: str) -> list[tuple[int, str, int | None]]:
    """``(address, operation, address branched to)`` of a kernel's machine code, written out."""
    found = []
    for line in text.splitlines():
        match = re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)(.*?);", line)
        if match:
            place, operation, rest = match.groups()
            to = re.search(r"0x([0-9a-f]+)\s*$", rest.strip()) if operation == "BRA" else None
            found.append((int(place, 16), operation, int(to[1], 16) if to else None))
    return found


def code_of(compiled: Compiled) -> str:
    """The machine code of a kernel for an NVIDIA card, as text."""
    return tool("cuobjdump", "-sass", binary=compiled.binary)


def loops(text: str) -> list[dict[str, int]]:
    """Instructions of each innermost loop that makes exponentials and products, counted by kind,
    shortest first. Loops that wait for a barrier are part of the one around them.
    """
    code = instructions(text)
    ranges = [(to, at) for at, _, to in code if to is not None and to < at]
    counted = [(part, _counts(code, *part)) for part in ranges]
    made = [(part, c) for part, c in counted if c["exponentials"] and c["products"]]
    found = [
        c
        for (first, last), c in made
        if not any(first <= a and b <= last and (a, b) != (first, last) for (a, b), _ in made)
    ]
    return sorted(found, key=lambda c: sum(c.values()))


def _counts(code: list[tuple[int, str, int | None]], first: int, last: int) -> dict[str, int]:
    counts = dict.fromkeys([*KINDS, "integers"], 0)
    for at, operation, _ in code:
        if first <= at <= last:
            counts[kind_of(operation)] += 1
    return counts


def kept_in_memory(text: str) -> int:
    """Instructions inside of loops that make exponentials which read or write registers that are
    kept in memory.
    """
    code = instructions(text)
    ranges = [(to, at) for at, _, to in code if to is not None and to < at]
    hot = [part for part in ranges if _counts(code, *part)["exponentials"]]
    local = [at for at, operation, _ in code if operation.startswith(("LDL", "STL"))]
    return sum(any(first <= at <= last for first, last in hot) for at in local)


def per_score(compiled: Compiled, counts: dict[str, int]) -> dict[str, float]:
    """Instructions that a thread issues for a score, by kind."""
    assert compiled.tile is not None
    threads = 32 * compiled.warps
    scores = compiled.tile[0] * compiled.tile[1] / threads
    return {kind: count / scores for kind, count in counts.items()}
