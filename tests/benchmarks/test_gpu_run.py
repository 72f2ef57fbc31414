"""The run of the GPU suite: its clock, its processes, its rehearsal."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from attnbias import kernels
from benchmarks import common
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import device, work
from benchmarks.gpu.case import Case
from benchmarks.gpu.device import Device, turns
from benchmarks.gpu.group import Context, Group
from benchmarks.gpu.kinds import KEY
from benchmarks.gpu.measure import Lost
from tests.benchmarks.gpu_results import result

CPU = Device("cpu")

# The clock ----------------------------------------------------------------------------------------


class FakeEvent:
    """Two of them are four milliseconds apart."""

    log: ClassVar[list[str]] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.log.append("record")

    def synchronize(self) -> None:
        self.log.append("wait")

    def elapsed_time(self, other: FakeEvent) -> float:
        return 4.0


def test_a_sample_is_what_lies_between_two_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches overwritten and the queue held before the first, nothing but the call between."""
    log = FakeEvent.log = []
    card = Device("cuda")
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(f"hold {cycles}"))
    device._cycles.cache_clear()
    monkeypatch.setattr(device, "_flush_buffer", lambda: torch.ones(1))
    assert device._cycles() == 20_000_000 / 0.004
    log.clear()
    assert card.sample(lambda: log.append("call"), hold=1e-3) == pytest.approx(0.004)
    assert log == [f"hold {int(1e-3 * 5e9)}", "record", "call", "record", "wait"]
    log.clear()
    lines: dict[str, Any] = {"one": (lambda: log.append("prepare"), lambda _: log.append("call"))}
    found = turns(card, lines, budget=1e3, least=2, most=2, on_error=lambda *_: None)
    assert found["one"].samples == (0.004, 0.004)
    between = " ".join(log).split("record")[1::2]
    assert {part.strip() for part in between} == {"call"}  # a graph is made outside
    device._cycles.cache_clear()


def test_memory_is_what_a_call_takes_at_its_highest(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"now": 100, "highest": 0}

    def call() -> None:
        held["highest"] = held["now"] + 50

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: held.update(highest=0))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: held["highest"])
    assert Device("cuda").peak(call) == 50


def test_a_card_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=15 * 10**10,
        L2_cache_size=60 * 2**20, shared_memory_per_block_optin=232_448,
    )  # fmt: skip
    said = "570.86.15, 1980 MHz, 3201 MHz, 700.00 W"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    done = SimpleNamespace(stdout=said + "\n")
    monkeypatch.setattr(device.subprocess, "run", lambda *_, **__: done)
    found = Device("cuda").describe()
    assert (found["capability"], found["l2_mb"], found["shared_kb"]) == ("9.0", 60.0, 227)
    assert found["driver_version"] == "570.86.15"
    assert {"torch", "triton", "cuda", "cudnn"} <= set(found["versions"])
    assert command.slug(found["name"]) == "nvidia_h200"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--rehearse"):
        device.open_device(False)  # a GPU is asked for where there is none


def test_lines_take_turns_and_one_that_fails_leaves() -> None:
    order: list[str] = []
    failed: list[str] = []

    def odd(given: Any) -> None:
        raise ValueError("odd")

    def call(name: str) -> Callable[[Any], None]:
        return lambda given: order.append(f"{name}{given}")

    lines: dict[str, Any] = {
        "one": (lambda: 1, call("one")),
        "bad": (None, odd),
        "two": (None, call("two")),
    }
    found = turns(CPU, lines, budget=0.0, on_error=lambda name, error: failed.append(name))
    assert failed == ["bad"]
    assert set(found) == {"one", "two"}
    assert order == ["one1", "twoNone"]


# The run -----------------------------------------------------------------------------------------


def fake(key: str, seconds: float = 0.0) -> Group:
    def run(context: Context) -> dict[str, Any]:
        for line in ("flash", "ours"):
            context.say(line)
        case = Case(key.split("/")[0], KEY, "cpu", 8, 8, 1024, 64)
        return {**result(case, 1.0), "skipped": list(context.skip)}

    script, _, name = key.partition("/")
    return Group(script, name, run, size=seconds)


KEYS = ("t5/one", "t5/two", "solver/one")


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three groups that measure nothing, on a card that is not there."""
    made = {key: fake(key) for key in KEYS}
    monkeypatch.setattr(work, "all_groups", lambda rehearse, names=(): made)
    card = {"name": "NVIDIA H200", "versions": {"torch": "2"}}
    monkeypatch.setattr(Device, "describe", lambda self: card)
    monkeypatch.setattr("benchmarks.gpu.device.open_device", lambda rehearse: CPU)
    monkeypatch.setattr(common, "commit", lambda: {"commit": "0", "dirty": False})


def words_of(
    asked: Mapping[str, Any], dies: Mapping[str, Sequence[str]]
) -> Iterator[dict[str, Any]]:
    """What a process would say that dies in a line of some groups."""
    told: list[dict[str, Any]] = []
    groups = work.all_groups(False)
    yield {"ceilings": {"bfloat16": 1e15}}
    for key in asked["keys"]:
        skips, until = asked["skips"], asked["until"]
        bad = [line for line in dies.get(key, ()) if line not in skips.get(key, ())]
        if bad:
            yield {"at": bad[0], "of": key}
            yield {"code": -9}
            return
        work.measure_all(
            [groups[key]], CPU, lambda said: told.append(dict(said)),
            budget=0.0, until=until, ceilings={}, skips=skips,
        )  # fmt: skip
        yield from told
        told.clear()
    yield {"code": 0}


def test_a_run_goes_on_where_it_stopped(
    suite: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asks: list[list[str]] = []

    def words(asked: Mapping[str, Any], *_: float) -> Iterator[dict[str, Any]]:
        asks.append(list(asked["keys"]))
        return words_of(asked, {"t5/two": ["FlexAttention"]})

    monkeypatch.setattr(command, "words", words)
    out = tmp_path / "card.json"
    assert command.main(["--out", str(out)]) == 0
    # The process that died began again with what was left, and the group came last.
    assert asks == [list(KEYS), ["solver/one", "t5/two"]]
    found = json.loads(out.read_text())
    assert set(found["groups"]) == set(KEYS)
    assert found["groups"]["t5/two"]["skipped"] == ["FlexAttention"]
    assert found["ceilings"] == {"bfloat16": 1e15}
    assert found["complete"]
    text = out.with_suffix(".md").read_text()
    assert "# GPU benchmarks on NVIDIA H200" in text
    assert "| t5: relative with its table's gradient, both passes |" in text
    asks.clear()
    assert command.main(["--out", str(out)]) == 0
    assert asks == []
    assert command.main(["--out", str(out), "--fresh"]) == 0
    assert asks[0] == list(KEYS)


def test_a_group_that_always_kills_its_process_is_given_up(
    suite: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def words(asked: Mapping[str, Any], *_: float) -> Iterator[dict[str, Any]]:
        return words_of(asked, {"t5/one": ["one", "two", "three"]})

    monkeypatch.setattr(command, "words", words)
    out = tmp_path / "card.json"
    assert command.main(["--out", str(out), "--match", "t5"]) == 1
    found = json.loads(out.read_text())["groups"]
    assert found["t5/two"]["status"] == "ok"
    assert found["t5/one"]["reason"] == "the process died in one, two, three"
    assert "the process ended with code -9 in one" in capsys.readouterr().err


def test_no_group_is_begun_that_would_end_too_late(suite: None) -> None:
    told: list[Mapping[str, Any]] = []
    todo = list(work.all_groups(False).values())
    assert work.measure_all(todo, CPU, told.append, budget=0.0, until=0.0, ceilings={}) == 3
    assert told == []


def test_the_line_that_lost_the_device_is_named() -> None:
    def run(context: Context) -> dict[str, Any]:
        context.say("FlexAttention")  # the last that began; the error came up in another
        raise Lost("ours", RuntimeError("CUDA error: an illegal memory access"))

    told: list[Mapping[str, Any]] = []
    with pytest.raises(Lost, match="ours: RuntimeError: CUDA error"):
        work.measure_all(
            [Group("t5", "one", run)], CPU, told.append,
            budget=0.0, until=time.time() + 60, ceilings={},
        )  # fmt: skip
    places = [one["at"] for one in told if "at" in one]
    assert places == ["FlexAttention", "ours"]


def test_results_of_a_rehearsal_are_written_nowhere(
    suite: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    monkeypatch.setattr("benchmarks.gpu.ceilings.measure", lambda device: {"copy": 1.0})
    assert command.main(["--rehearse"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert command.main(["--rehearse", "--only", "nothing"]) == 2


def test_a_process_that_hangs_is_ended() -> None:
    """It is silent for longer than the patience while it starts."""
    asked = {
        "keys": [], "rehearse": True, "budget": 0.0, "until": time.time() + 60,
        "ceilings": {}, "skips": {},
    }  # fmt: skip
    assert list(command.words(asked, patience=0.1, grace=1.0)) == [{"code": -9}]


@pytest.mark.slow
def test_a_process_measures_and_tells() -> None:
    key = next(key for key in work.all_groups(True) if key.startswith("triangle/"))
    asked = {
        "keys": [key], "rehearse": True, "budget": 0.0, "until": time.time() + 200,
        "ceilings": None, "skips": {key: ["ours, no bias"]},
    }  # fmt: skip
    said = list(command.words(asked, patience=150.0, grace=1.0))
    assert said[-1] == {"code": 0}
    names = [next(iter(one)) for one in said]
    assert names[:2] == ["device", "ceilings"]
    group = next(one["group"] for one in said if "key" in one)
    assert group["lines"]["ours"]["status"] == "ok"
    assert group["lines"]["ours, no bias"]["status"] == "failed"


# The rehearsal ------------------------------------------------------------------------------------

QUICK = ("triangle/", "seen/T5 buckets, causal, no bias")
SLOW = (
    "flashbias/key bias",
    "flashbias/low rank", "flashbias/ALiBi", "bsa/", "bsa_whole/", "solver/", "swin/", "t5/",
    "penguin/", "models/", "seen/T5 buckets, full, biased",
)  # fmt: skip


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels, which are switched off outside their own tests."""
    pytest.importorskip("triton", reason="Triton: an extra where there is no GPU")
    monkeypatch.setattr(kernels, "_off", 0)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels: they are compiled here, not interpreted"
)
@pytest.mark.parametrize(
    "word", [*QUICK, *(pytest.param(word, marks=pytest.mark.slow) for word in SLOW)]
)
def test_a_rehearsal_runs_to_its_end(
    word: str, interpreted: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Every line that is there is right, and ours repeats bit for bit."""
    monkeypatch.setattr("benchmarks.gpu.ceilings.measure", lambda device: {"bfloat16": 1e9})
    code = command.main(["--rehearse", "--match", word])
    said = capsys.readouterr()
    assert code == 0, said.err


def test_every_group_is_rehearsed() -> None:
    words = (*QUICK, *SLOW)
    rest = [key for key in work.all_groups(True) if not any(word in key for word in words)]
    assert all(key.startswith("seen/") for key in rest), rest
    assert {key.split("/")[0] for key in work.all_groups(True)} == set(work.SCRIPTS)
