"""The device measured: its clock, its peak memory, what it is.

A sample is the time between two CUDA events. Before it the L2 cache is overwritten and the queue is
held up for as long as the host needs to launch the call, so that it is the device's own time; what
a caller waits for, launches included, is measured apart (`Device.wall`). Without a GPU the same
calls run on the CPU by the host's clock: a rehearsal, whose times mean nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.timing import Timing, rounds_for

Call = Callable[[], Any]
LEAST_FLUSH = 256 * 2**20  # bytes; at least twice the L2 cache
LONGEST_HOLD = 0.05  # seconds that the queue is held up at most
SLOW = 4.0  # times the budget: a round that takes longer is repeated once


@dataclass(frozen=True)
class Device:
    """Where lines run: ``cuda``, or ``cpu`` for a rehearsal."""

    name: str

    @property
    def rehearsal(self) -> bool:
        return self.name == "cpu"

    def wait(self) -> None:
        if not self.rehearsal:
            torch.cuda.synchronize()

    def empty(self) -> None:
        """Give back what is kept of freed memory, so that the next line begins alike."""
        if not self.rehearsal:
            torch.cuda.empty_cache()

    def free(self) -> int:
        """Bytes that are free."""
        if self.rehearsal:
            return 1 << 30
        return int(torch.cuda.mem_get_info()[0])

    def sample(self, call: Call, hold: float = 0.0) -> float:
        """Seconds of one call on the device; the queue waits `hold` seconds before it."""
        if self.rehearsal:
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        _flush_buffer().zero_()
        cuda: Any = torch.cuda
        cuda._sleep(int(min(hold, LONGEST_HOLD) * _cycles()))
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def launch(self, call: Call) -> float:
        """Seconds until the host has launched a call, the device being busy with it or not."""
        self.wait()
        begin = time.perf_counter()
        call()
        taken = time.perf_counter() - begin
        self.wait()
        return taken

    def wall(self, call: Call) -> float:
        """Seconds from an idle queue until a call is done: what one caller waits for."""
        self.wait()
        begin = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - begin

    def peak(self, call: Call) -> int | None:
        """Bytes that a call took at its highest beyond what was there; None in a rehearsal."""
        if self.rehearsal:
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.wait()
        return int(torch.cuda.max_memory_allocated() - before)

    def describe(self) -> dict[str, Any]:
        """Name, driver, memory, caches, clocks, and versions that can move a number."""
        made = {"torch": torch.__version__, "python": platform.python_version()}
        made["triton"] = _version("triton")
        made["attnbias"] = _version("attnbias")
        made["transformers"] = _version("transformers")
        if self.rehearsal:
            return {"name": "rehearsal on a CPU", "versions": made}
        found = torch.cuda.get_device_properties(0)
        cudnn: Any = torch.backends.cudnn
        made |= {
            "cuda": str(torch.version.cuda or torch.version.hip),
            "cudnn": str(cudnn.version()),
        }
        return {
            "name": found.name,
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_gb": round(found.total_memory / 1e9, 1),
            "l2_mb": round(getattr(found, "L2_cache_size", 0) / 2**20, 1),
            "shared_kb": getattr(found, "shared_memory_per_block_optin", 0) // 1024,
            **_asked_of_the_driver(),
            "versions": made,
        }


def open_device(rehearse: bool) -> Device:
    """The GPU, or the CPU for a rehearsal."""
    if rehearse:
        return Device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit(
            "no GPU is here: python -m benchmarks.gpu --rehearse runs all scripts at tiny sizes, "
            "with interpreted kernels, and records nothing"
        )
    return Device("cuda")


def turns(
    device: Device,
    lines: Mapping[str, tuple[Callable[[], Any] | None, Callable[[Any], Any]]],
    *,
    budget: float,
    least: int = 5,
    most: int = 50,
    on_error: Callable[[str, Exception], None],
) -> dict[str, Timing]:
    """Samples of every line by turns, the first to run changing from round to round.

    A line is ``(prepare, call)``: `prepare` runs outside the timed region and its result goes to
    `call` (a graph to go backward through). What is compiled was compiled before. The first round
    warms up and tells how long the host needs to launch each call; the second how many rounds fit
    the budget: at least `least`, or two where a round is far beyond it.
    """
    alive = dict(lines)
    holds: dict[str, float] = {}
    samples: dict[str, list[float]] = {name: [] for name in lines}

    def one(name: str, keep: bool) -> float:
        prepare, call = alive[name]
        given = None if prepare is None else prepare()
        if name not in holds and not device.rehearsal:
            holds[name] = 1.5 * device.launch(lambda: call(given))
            given = None if prepare is None else prepare()
        taken = device.sample(lambda: call(given), holds.get(name, 0.0))
        if keep:
            samples[name].append(taken)
        return taken

    def one_round(index: int, keep: bool) -> float:
        begin = time.perf_counter()
        names = list(alive)
        turn = index % max(len(names), 1)
        for name in names[turn:] + names[:turn]:
            try:
                one(name, keep)
            except Exception as error:
                del alive[name]
                on_error(name, error)
        return time.perf_counter() - begin

    if not device.rehearsal:
        one_round(0, keep=False)
    first = one_round(0, keep=True)
    least = least if first < SLOW * budget else 2
    count = 1 if device.rehearsal else rounds_for(first, budget=budget, least=least, most=most)
    for index in range(1, count):
        one_round(index, keep=True)
    return {name: Timing(tuple(samples[name])) for name in alive}


@functools.cache
def _flush_buffer() -> torch.Tensor:
    size = 2 * getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)
    return torch.empty(max(size, LEAST_FLUSH), dtype=torch.int8, device="cuda")


@functools.cache
def _cycles() -> float:
    """Cycles of the device's counter in a second, by what a known number of them takes."""
    count = 20_000_000
    cuda: Any = torch.cuda
    start, end = (cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):
        start.record()
        cuda._sleep(count)
        end.record()
        end.synchronize()
    return 1e3 * count / float(start.elapsed_time(end))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        with contextlib.suppress(ImportError):
            return str(getattr(__import__(package), "__version__", "unknown"))
        return "not installed"


def _asked_of_the_driver() -> dict[str, str]:
    """Driver, clocks and power limit as nvidia-smi gives them; nothing where there is none."""
    names = ("driver_version", "clocks.max.sm", "clocks.max.memory", "power.limit")
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = done.stdout.splitlines()[0].split(",")
    return {name: value.strip() for name, value in zip(names, values, strict=False)}
